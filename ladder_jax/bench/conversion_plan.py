"""The conversion study's options, and the runs that they ask for."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ladder_jax.arguments import POSITIONAL
from ladder_jax.config import require

METHODS = ("sft", "distill", "anneal", "gated")
ORDER = ["distill", "anneal", "gated", "sft"]  # the most valuable first


@dataclass(frozen=True)
class Arguments:
    """Converts a pretrained model in several ways, trains it a little in several ways,
    and measures how far that brings it back."""

    parent: str = field(metadata=POSITIONAL)
    """The checkpoint of a pretrained standard model."""
    out: str = "runs/conversion"
    """The folder of texts, rows.csv, table.md and plot.png."""
    budgets: tuple[float, ...] = (0, 1e5, 3e5, 1e6, 3e6)
    """Tokens of training after which the loss is measured."""
    layers: tuple[str, ...] = ("last:15", "auto:15", "all", "last:10")
    """The layers that are made ladder: last:K, auto:K or all."""
    methods: tuple[str, ...] = METHODS[:3]
    """The ways to train: sft (next token), distill, anneal (distillation with an
    annealed delay), gated (the same, and the delay waits for the held-out loss)."""
    seeds: int = 2
    """Runs of each kind, which differ in the order of the text."""
    batch: int = 32
    """Sequences in a step."""
    length: int = 512
    """Tokens of a sequence."""
    long_budgets: tuple[float, ...] = ()
    """Larger budgets, for runs of the control, of the first layers and of all layers
    with distill, and of all layers with anneal."""
    rates: tuple[float, ...] = (3e-4,)
    """Learning rates. The first is used for everything, the others for the first seed
    of the control, and of the first layers and all layers with distill."""
    warmup: int = 10
    """Steps in which the learning rate rises."""
    anneal: float = 0.3
    """The share of a run in which the delay is annealed."""
    tolerance: float = 0.2
    """gated: the delay waits while the held-out loss of the blended model is more than
    this above the parent's, in nats a token (see distill.anneal_tolerance)."""
    gate_every: int = 5
    """gated: steps between two measurements of the blended model."""
    gate_batches: int = 1
    """gated: held-out batches of such a measurement."""
    cross_entropy: float = 0.1
    """The weight of the cross-entropy beside the divergence."""
    measured_tokens: int = 32768
    """Tokens of each held-out text."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, such as ladder_local: their accuracy is measured
    before the first step of a run and after its last one."""
    task_path: str = "configs/eval"
    """A folder with tasks of your own, for --tasks."""
    task_limit: int | None = None
    """Examples of each task. None: all."""
    dtype: str = "auto"
    """The dtype of computation. auto: float32 on CPUs, bfloat16 elsewhere."""
    minutes: float | None = None
    """Stop after this time; the most valuable runs come first."""
    save: bool = False
    """Save the state at each budget, so that a stopped run goes on from there."""
    chunk: int = 4096
    """Tokens whose logits exist at one time."""
    kernel: str | None = None
    """The kernel of attention: xla, cudnn or splash. None: see attention.kernel_for."""

    def __post_init__(self) -> None:
        for method in self.methods:
            require(method in METHODS, "methods", method, f"of {', '.join(METHODS)}")
        require(len(self.budgets) > 1, "budgets", self.budgets, "two or more")
        require(self.tolerance >= 0, "tolerance", self.tolerance, "0 or more")
        for name in ("gate_every", "gate_batches"):
            value = getattr(self, name)
            require(value >= 1, name, value, "1 or more")
        limit = self.task_limit
        require(limit is None or limit >= 1, "task_limit", limit, "1 or more")

    def settings(self) -> dict[str, Any]:
        """What all rows of a study must have in common."""
        free = {"out", "budgets", "layers", "methods", "seeds", "long_budgets", "rates"}
        free |= {"minutes", "save", "chunk", "kernel"}
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in free}


class Run(NamedTuple):
    """One training run of the study."""

    layers: str  # "none": the control
    method: str
    seed: int
    rate: float
    total: int  # tokens


def runs(arguments: Arguments) -> list[Run]:
    """All runs, the most valuable first."""
    rate, *others = arguments.rates
    first = arguments.layers[0]
    control = ("none", "sft")
    # The first layers with every method; then distillation of the others, and so on.
    kinds = [control, *((first, method) for method in arguments.methods)]
    for method in sorted(arguments.methods, key=ORDER.index):
        kinds += [(layers, method) for layers in arguments.layers[1:]]
    total = whole_steps(arguments, max(arguments.budgets))
    plan = [Run(*kind, 0, rate, total) for kind in kinds]
    picked = [control, (first, "distill"), ("all", "distill"), ("all", "anneal")]
    picked = [kind for kind in picked if kind in kinds]
    plan += [Run(*kind, 0, other, total) for other in others for kind in picked[:3]]
    if arguments.long_budgets:
        longest = whole_steps(arguments, max(arguments.long_budgets))
        plan += [Run(*kind, 0, rate, longest) for kind in picked]
    for seed in range(1, arguments.seeds):
        plan += [Run(*kind, seed, rate, total) for kind in kinds]
    return plan


def whole_steps(arguments: Arguments, tokens: float) -> int:
    """`tokens`, rounded to whole steps."""
    per_step = arguments.batch * arguments.length
    return round(tokens / per_step) * per_step
