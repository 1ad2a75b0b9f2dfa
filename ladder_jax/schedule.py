"""Residual schedules as data.

A schedule says for each block what it computes, how stale a stream it reads, and
whether its partial is reduced. With y_j block j's reduced output, block b with delay d
reads `embedding + sum(y_j for j < b - d)`.
Notation, the same in configs, on the command line and in checkpoints:

    standard            every block reads the outputs of all earlier blocks (delay 0)
    ladder              every block reads a stream one block stale (Ladder Residual,
                        arXiv 2501.06589, eq. 2)
    ladder:A,M          delay A for attention blocks, M for MLP blocks
    hybrid:last16       ladder for the last 16 layers, standard before
    hybrid:3,5-9        ladder for these layers, standard for the others
    delays:0,1,1,2,...  a delay for every block
    parallel            attention and MLP share a norm and a reduction (GPT-J, PaLM)
    desync:n            one reduction every n blocks (published: 2, 4), which also
                        replaces the tensor shards' streams by their mean
    dtp:d               every tensor shard adds its own partial at once, and those of
                        the other shards d blocks later (Delayed Tensor Parallelism,
                        Kog 2026: residual/dtp.py); dtp:0 is standard
    upper-bound         no reduction at all: wrong outputs, at the speed of a machine
                        whose communication takes no time
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

ATTENTION, MLP = ("attention",), ("mlp",)


class Block(NamedTuple):
    """One block of the residual schedule."""

    # What it computes, on one shared norm: ("attention",), ("mlp",) or both.
    parts: tuple[str, ...]
    delay: int = 0  # how many of the newest partials it does not read
    reduce: bool = True  # False: each tensor shard adds only its own partial
    # With dtp: how many earlier blocks' partials the other shards still lack when the
    # block starts, and whether the oldest of them joins their streams after it.
    in_flight: int = 0
    lands: bool = False
    window: bool = False  # its attention sees the model's sliding window alone
    rope: bool = True  # its attention has rotary embedding

    @property
    def overlaps(self) -> bool:
        """Whether an earlier block's reduction can run while this one computes."""
        return self.delay > 0 or self.in_flight > 0


class Schedule(NamedTuple):
    """A model's blocks, layer by layer."""

    layers: tuple[tuple[Block, ...], ...]
    # True (desync, dtp, upper-bound): every tensor shard has its own stream, so that
    # the model belongs to one size of the tensor axis.
    local: bool = False
    # True (dtp): at the end every shard normalises its stream, and the head reads the
    # mean of them.
    mean: bool = False

    @property
    def overlaps(self) -> bool:
        """Whether a reduction can run beside some block."""
        return any(block.overlaps for layer in self.layers for block in layer)


FORMS = (
    "standard, ladder, ladder:A,M, hybrid:lastK, hybrid:LAYERS (such as 3,5-9), "
    "delays:D,D,... (one a block), parallel, desync:N, dtp:D or upper-bound"
)


def parse(
    notation: str,
    layers: int,
    *,
    window_layers: str = "none",
    nope_layers: str = "none",
) -> Schedule:
    """The `Schedule` of a model with `layers` layers.

    Args:
      notation: one of FORMS.
      layers: how many.
      window_layers: those with a sliding window, in the notation of `parse_layers`.
      nope_layers: those without rotary embedding.

    Raises ValueError, which says which forms are accepted.
    """
    plain = _parse(notation, layers)
    windowed = parse_layers(window_layers, layers)
    without_rope = parse_layers(nope_layers, layers)

    def mark(number: int, block: Block) -> Block:
        if "attention" not in block.parts:
            return block
        return block._replace(
            window=number in windowed, rope=number not in without_rope
        )

    marked = [
        tuple(mark(number, block) for block in blocks)
        for number, blocks in enumerate(plain.layers)
    ]
    return plain._replace(layers=tuple(marked))


def _parse(notation: str, layers: int) -> Schedule:
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
            stale = _listed_layers(argument, "hybrid:", layers)
            delays = [int(layer in stale) for layer in range(layers)]
            return _delayed([delay for delay in delays for _ in range(2)])
        case "delays":
            return _delayed(_block_delays(argument, layers))
        case "parallel":
            return Schedule(((Block(ATTENTION + MLP),),) * layers)
        case "desync":
            numbers = _numbers(argument, "desync:N")
            if len(numbers) != 1 or numbers[0] < 1:
                raise ValueError("desync:N takes one number of blocks, 1 or more")
            interval, last = numbers[0], 2 * layers - 1
            return _desync(lambda b: (b + 1) % interval == 0 or b == last, layers)
        case "dtp":
            numbers = _numbers(argument, "dtp:D")
            if len(numbers) != 1 or numbers[0] > layers:
                raise ValueError(
                    f"dtp:D takes one delay, from 0 to {layers}: half of the "
                    f"{2 * layers} blocks"
                )
            return _dtp(numbers[0], layers)
        case "upper-bound":
            return _desync(lambda block: False, layers)
    raise ValueError(f"it must be {FORMS}")


def _delayed(delays: Sequence[int]) -> Schedule:
    """A schedule of attention and MLP blocks with these delays, one a block."""
    pairs = zip(delays[::2], delays[1::2])
    return Schedule(tuple((Block(ATTENTION, a), Block(MLP, m)) for a, m in pairs))


def _ramp(delays: Iterable[int]) -> list[int]:
    """`delays`, lowered where needed so that they rise by at most one a block.

    So no block reads an older stream than the block before it.
    """
    ramp: list[int] = []
    for delay in delays:
        ramp.append(min(delay, ramp[-1] + 1) if ramp else delay)
    return ramp


def _block_delays(argument: str, layers: int) -> list[int]:
    """The delays of `delays:D,D,...`, two a layer."""
    delays = _numbers(argument, "delays:D,D,...")
    if len(delays) != 2 * layers:
        raise ValueError(
            f"it names {len(delays)} delays, but {layers} layers have "
            f"{2 * layers} blocks"
        )
    for block, (before, delay) in enumerate(zip(delays, delays[1:]), start=1):
        if delay > before + 1:
            raise ValueError(
                f"block {block} has delay {delay} after {before}, but a delay can grow "
                "by at most one a block: a block does not read an older stream than "
                "the one before it"
            )
    return delays


def _desync(reduces: Callable[[int], bool], layers: int) -> Schedule:
    """A schedule of shards' own streams; block b is reduced where `reduces(b)`."""
    blocks = [
        (Block(ATTENTION, 0, reduces(2 * i)), Block(MLP, 0, reduces(2 * i + 1)))
        for i in range(layers)
    ]
    return Schedule(tuple(blocks), local=True)


def _dtp(delay: int, layers: int) -> Schedule:
    """A schedule of shards' own streams, which lack the newest `delay` corrections."""
    if not delay:
        return _delayed([0] * 2 * layers)
    sent = 2 * layers - delay  # the blocks whose partials reach the other shards

    def block(parts: tuple[str, ...], number: int) -> Block:
        in_flight = min(number, sent) - max(number - delay, 0)
        return Block(parts, 0, number < sent, in_flight, number >= delay)

    blocks = [(block(ATTENTION, 2 * i), block(MLP, 2 * i + 1)) for i in range(layers)]
    return Schedule(tuple(blocks), local=True, mean=True)


def _numbers(text: str, form: str) -> list[int]:
    """The whole numbers of "1,2,3"; `form` is for the error message."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{form} takes whole numbers, not {text!r}") from None
    if min(numbers) < 0:
        raise ValueError(f"{form} takes numbers from 0 up, not {text!r}")
    return numbers


def parse_layers(text: str, layers: int) -> frozenset[int]:
    """The layers that a text names: all, none, lastK, or such as 0,2,5-9.

    Raises ValueError, which says what is accepted.
    """
    if text in ("all", "none"):
        return frozenset(range(layers if text == "all" else 0))
    try:
        return frozenset(_listed_layers(text, "", layers))
    except ValueError as error:
        forms = "all, none, lastK or layers such as 0,2,5-9"
        raise ValueError(f"it must be {forms} ({error})") from None


def format_layers(numbers: Iterable[int], layers: int) -> str:
    """The text that `parse_layers` reads as these of `layers` layers."""
    chosen = sorted(set(numbers))
    if len(chosen) in (0, layers):
        return "all" if chosen else "none"
    ranges: list[list[int]] = []
    for number in chosen:
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ",".join("-".join(map(str, ends)) for ends in ranges)


def _listed_layers(text: str, prefix: str, layers: int) -> set[int]:
    """The layers of "last16" or "3,5-9"; `prefix` is for the error message."""
    if text.startswith("last"):
        count, *more = _numbers(text[4:], f"{prefix}lastK")
        if more:
            raise ValueError(f"{prefix}lastK takes one number of layers")
        if count > layers:
            raise ValueError(f"{text} asks for more than the {layers} layers there are")
        return set(range(layers - count, layers))
    listed: set[int] = set()
    for part in text.split(","):
        ends = _numbers(part.replace("-", ","), f"{prefix}LAYERS")
        if len(ends) > 2 or ends[0] > ends[-1]:
            raise ValueError(f"{part} is not a layer or a range of layers such as 5-9")
        if ends[-1] >= layers:
            raise ValueError(f"layers run from 0 to {layers - 1}")
        listed |= set(range(ends[0], ends[-1] + 1))
    return listed
