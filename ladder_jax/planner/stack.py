"""Builds the short model that a plan compiles in place of the deep one.

Layers repeat, so that a plan need not compile all of them: an instruction of the short
model stands for several executions in the deep model.
"""

from typing import NamedTuple

from ladder_jax import schedule
from ladder_jax.config import ConfigError, Model
from ladder_jax.planner.hlo import Instruction, Module
from ladder_jax.planner.scopes import place_of
from ladder_jax.residual.layers import repeats


class Scan(NamedTuple):
    """A scan of repeated layers."""

    scope: str
    short: int  # its repetitions in the short model
    deep: int  # in the deep one


class Stack(NamedTuple):
    """The short model."""

    notation: str  # its residual schedule
    # Its layers with a sliding window, and those without rotary embedding, as in
    # config.Model.
    window_layers: str
    nope_layers: str
    # For each layer of the short model: the number of deep layers that it stands for.
    counts: tuple[float, ...]
    scans: tuple[Scan, ...] = ()

    def scan_of(self, loop: Instruction, module: Module) -> Scan | None:
        """The scan of layers that a loop is, or None.

        XLA gives a loop that it pipelines no name: then most of its body's instructions
        tell.
        """
        names = [loop.scope]
        if not loop.scope:
            body = module.computations[loop.called("body")]
            names = [one.scope for one in body.values() if one.opcode != "while"]
            names = list(filter(None, names))
        for scan in self.scans:
            if sum(scan.scope in name for name in names) > len(names) / 2:
                return scan
        return None

    def trips_of(self, loop: Instruction, module: Module) -> float:
        """How often a loop's body runs in the deep model.

        A scan of layers runs as often as there are repetitions, less those that XLA has
        taken out of the loop. For other loops it is the number that XLA knows, or 1.
        """
        scan, trips = self.scan_of(loop, module), module.trips(loop)
        if scan is None:
            return trips or 1
        return scan.deep - (scan.short - (trips or scan.short))


class LayerCounter:
    """The number of executions in the deep model that an instruction stands for.

    Call it with the scopes of instructions, in the order of issue. An instruction that
    XLA adds without a layer's scope belongs to the layer of the instructions around it.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.current = 1.0

    def __call__(self, scope: str) -> float:
        place = place_of(scope)
        if place.layer and not place.scanned:
            assert place.number is not None
            self.current = self.stack.counts[place.number]
        elif place.layer or place.block:
            self.current = 1.0
        return self.current


def shorten(model_config: Model, most: int, ends: int = 1) -> Stack:
    """The `Stack` for a deep model.

    Args:
      model_config: the deep model's.
      most: repetitions to compile of every pattern of layers that the schedule repeats.
      ends: how many of the last repetitions stand for themselves alone, as the first
        one does.
    Raises ConfigError where no short model has such a schedule.
    """
    notation, deep = model_config.residual, model_config.residual_schedule()
    short: list[tuple[schedule.Block, ...]] = []
    counts: list[float] = []
    scans: list[Scan] = []
    for start, stop, period in repeats(deep.layers):
        deep_repeats = (stop - start) // period
        short_repeats = min(deep_repeats, most)
        last = len(short) + short_repeats * period - 1
        scans.append(Scan(f"layers{len(short)}to{last}", short_repeats, deep_repeats))
        short.extend(deep.layers[start : start + short_repeats * period])
        for count in _counts(deep_repeats, short_repeats, ends):
            counts += [count] * period
    delays = ",".join(str(block.delay) for blocks in short for block in blocks)
    windowed = [i for i, blocks in enumerate(short) if any(b.window for b in blocks)]
    without_rope = [
        i for i, blocks in enumerate(short) if not all(b.rope for b in blocks)
    ]
    windows = schedule.format_layers(windowed, len(short))
    nope = schedule.format_layers(without_rope, len(short))
    for candidate in (notation, f"delays:{delays}"):
        try:
            parsed = schedule.parse(
                candidate, len(short), window_layers=windows, nope_layers=nope
            )
            if parsed.layers == tuple(short):
                if model_config.sliding_window is None:
                    windows = "all"  # which means nothing then
                return Stack(candidate, windows, nope, tuple(counts), tuple(scans))
        except ValueError:
            pass
    raise ConfigError(f"schedule={notation!r} has no shorter stack of the same kind")


def _counts(deep: int, short: int, ends: int) -> list[float]:
    """How many of `deep` repetitions each of the `short` ones stands for."""
    inner = short - 1 - ends
    if inner < 1:
        return [deep / short] * short
    return [1.0, *[(deep - 1 - ends) / inner] * inner, *[1.0] * ends]
