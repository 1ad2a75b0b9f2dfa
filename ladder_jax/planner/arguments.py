"""The arguments of `ladder-jax plan`. This file imports no JAX."""

from dataclasses import dataclass, field
from typing import Literal

from ladder_jax.arguments import POSITIONAL


@dataclass(frozen=True)
class PlanArguments:
    """Compiles a recipe's program for chips that this machine does not have, and shows
    its predicted time and which communication overlaps with compute."""

    recipe: str = field(metadata=POSITIONAL)
    """A Python file that defines a `config`."""
    target: str
    """TPU slice, such as v5e:2x4, v6e:2x4, v5p:2x2x2 or tpu7x:2x2x1; or nodes x GPUs
    that NVLink connects, such as h100:1x8, h200:1x8, b200:2x8 or gb200:1x72."""
    workload: Literal["decode", "prefill", "train"] = "decode"
    """The program: one decode step, one prefill, or one training step."""
    batch: int | None = None
    """Requests or sequences, over all devices. None: 1, or all that a training step of
    the recipe has, in its grad_accum_steps parts, with a fused attention kernel."""
    context: int | None = None
    """Tokens of the cache (decode), of a prompt (prefill) or of a sequence (train).
    None: 2048, or the model's max_length if that is less; the recipe's train.seq_len
    with a training step's own batch."""
    lengths: str | None = None
    """Plan a decode step over requests of mixed lengths, with rows and with pages: a
    TOML file such as configs/workloads/sharegpt.toml, or JSONL with the tokens of a
    live request in each line."""
    schedule: str | None = None
    """The residual schedule. None: the recipe's."""
    reduction: str = "auto"
    """The algorithm that sums partials: see --mesh.reduction of ladder-jax train."""
    tensor: int | None = None
    """Devices that share a block's work. None: the recipe's mesh.tensor."""
    kv_layout: Literal["auto", "pages", "rows"] = "auto"
    """Of decode's cache: rows of `context` tokens, or pages. auto: as in an engine."""
    tokens: int | None = None
    """Tokens that decode's requests have together. None: batch x context."""
    drafts: int = 0
    """Plan a decode step that computes so many drafted tokens of each request, too
    (speculation), beside the step without them."""
    accepted: float | None = None
    """Tokens that a pass with drafts gives a request on average. None: all."""
    compare: bool = False
    """Compare the schedules standard, parallel, ladder, hybrid, desync and dtp, and a
    model that does not communicate."""
    sweep: tuple[str, ...] = ()
    """Plan every combination of values, such as batch=1,4,16 tensor=2,4,8: of batch,
    context, tensor, schedule, reduction and target."""
    tune: bool = False
    """Plan decode steps with every reduction that may be the fastest, and add them to
    the table that the reduction "auto" reads. --sweep names the steps; without it they
    are batch=1,4,8,16,32,64 context=512."""
    network: str = "nvlink"
    """Of GPUs: nvlink, no-nvlink, pcie, symmetric (NCCL's symmetric buffers), or a JSON
    file of measured all-reduces of a node: [{"bytes": B, "us": T}, ...]."""
    calibration: str | None = None
    """Plan with what `ladder-jax bench device` measured, a JSON file, and print it
    beside the plan."""
    price: float | None = None
    """What an hour of a device costs: prints what a million tokens cost."""
    plot: str | None = None
    """Write the timeline to this PNG file; with --sweep, tokens/s of a request against
    tokens/s of a device."""
    trace: str | None = None
    """Write the timeline to this JSON file, which ui.perfetto.dev shows."""
    hlo: str | None = None
    """Write the text of XLA's scheduled program to this file."""
    json: bool = False
    """Print JSON."""
