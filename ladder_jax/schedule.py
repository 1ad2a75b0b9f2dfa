"""Residual schedules as data: which parts make a block, how stale a stream it reads, whether its partial is reduced.

With y_j block j's reduced output, block b with delay d reads `embedding + sum(y_j for j < b - d)`.
Notation, the same in configs, on the command line and in checkpoints:

    standard            every block reads all before it (delay 0)
    ladder              every block reads a stream one block stale (Ladder Residual, arXiv 2501.06589, eq. 2)
    ladder:A,M          delay A for attention blocks, M for MLP blocks
    hybrid:last16       ladder for the last 16 layers, standard before
    hybrid:3,5-9        ladder for these layers, standard for the others
    delays:0,1,1,2,...  a delay for every block
    parallel            attention and MLP share one norm and one reduction (GPT-J, PaLM)
    desync:n            one reduction every n blocks (published: 2, 4), with the mean rule for the ranks' streams
    upper-bound         no reduction at all: wrong outputs, the speed that no communication would give
"""

from typing import NamedTuple

ATTENTION, MLP = ("attention",), ("mlp",)


class Block(NamedTuple):
    """One block of the residual schedule."""

    parts: tuple[
        str, ...
    ]  # what is computed, on one shared norm: ("attention",), ("mlp",) or both
    delay: int = 0  # how many of the newest partials it does not see
    reduce: bool = True  # False: the partial stays this rank's own (desync)


class Schedule(NamedTuple):
    """A model's blocks, layer by layer."""

    layers: tuple[tuple[Block, ...], ...]
    local: bool = False  # ranks keep streams of their own between reductions (desync)


FORMS = (
    "standard, ladder, ladder:A,M, hybrid:lastK, hybrid:LAYERS (such as 3,5-9), delays:D,D,... (one a block), "
    "parallel, desync:N or upper-bound"
)


def parse(notation, layers):
    """The `Schedule` of a model with `layers` layers; ValueError says which forms are accepted."""
    kind, _, argument = notation.partition(":")
    if kind in ("standard", "parallel", "upper-bound") and argument:
        raise ValueError(f"{kind} takes no argument")
    match kind:
        case "standard":
            return _delayed([0] * 2 * layers)
        case "ladder":
            pair = _numbers(argument, "ladder:A,M") if argument else [1, 1]
            if len(pair) != 2:
                raise ValueError("ladder:A,M takes two delays, attention's and MLP's")
            return _delayed(_ramp(pair * layers))
        case "hybrid":
            chosen = _layers(argument, layers)
            return _delayed(
                [int(layer in chosen) for layer in range(layers) for _ in range(2)]
            )
        case "delays":
            delays = _numbers(argument, "delays:D,D,...")
            if len(delays) != 2 * layers:
                raise ValueError(
                    f"it names {len(delays)} delays, but {layers} layers have {2 * layers} blocks"
                )
            for block, (before, delay) in enumerate(zip([-1] + delays, delays)):
                if block and delay > before + 1:
                    raise ValueError(
                        f"block {block} has delay {delay} after {before}, but a delay can grow by at most "
                        "one a block: a block does not read an older stream than the one before it"
                    )
            return _delayed(delays)
        case "parallel":
            return Schedule(((Block(ATTENTION + MLP),),) * layers)
        case "desync":
            numbers = _numbers(argument, "desync:N")
            if len(numbers) != 1 or numbers[0] < 1:
                raise ValueError("desync:N takes one number of blocks, 1 or more")
            return _desync(
                lambda block: (block + 1) % numbers[0] == 0 or block == 2 * layers - 1,
                layers,
            )
        case "upper-bound":
            return _desync(lambda block: False, layers)
    raise ValueError(f"it must be {FORMS}")


def _delayed(delays):
    pairs = zip(delays[::2], delays[1::2])
    return Schedule(tuple((Block(ATTENTION, a), Block(MLP, m)) for a, m in pairs))


def _ramp(delays):
    """`delays` with every rise spread over blocks, so that no block reads an older stream than the one before it."""
    made = []
    for delay in delays:
        made.append(min(delay, made[-1] + 1) if made else delay)
    return made


def _desync(reduces, layers):
    return Schedule(
        tuple(
            (Block(ATTENTION, 0, reduces(2 * i)), Block(MLP, 0, reduces(2 * i + 1)))
            for i in range(layers)
        ),
        local=True,
    )


def _numbers(text, form):
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{form} takes whole numbers, not {text!r}") from None
    if min(numbers) < 0:
        raise ValueError(f"{form} takes numbers from 0 up, not {text!r}")
    return numbers


def _layers(text, layers):
    if text.startswith("last"):
        count, *more = _numbers(text[4:], "hybrid:lastK")
        if more:
            raise ValueError("hybrid:lastK takes one number of layers")
        if count > layers:
            raise ValueError(f"{text} asks for more than the {layers} layers there are")
        return set(range(layers - count, layers))
    chosen = set()
    for part in text.split(","):
        ends = _numbers(part.replace("-", ","), "hybrid:LAYERS")
        if len(ends) > 2 or ends[0] > ends[-1]:
            raise ValueError(f"{part} is not a layer or a range of layers such as 5-9")
        chosen |= set(range(ends[0], ends[-1] + 1))
    if not chosen or max(chosen) >= layers:
        raise ValueError(f"layers run from 0 to {layers - 1}")
    return chosen
