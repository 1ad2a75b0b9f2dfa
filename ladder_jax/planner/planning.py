"""`ladder_jax.plan`: what a program would do on chips that are not here."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax

from ladder_jax import sharding
from ladder_jax.config import Config, ConfigError, Mesh, require
from ladder_jax.hardware import aot
from ladder_jax.planner import drafts, lanes, lengths, tables, use
from ladder_jax.planner.plan import Request, build, kernel_of, make_mesh_for
from ladder_jax.planner.report import make_report, make_timeline
from ladder_jax.planner.timeline import Timeline

WORKLOADS = ("decode", "prefill", "train")
LAYOUTS = ("auto", "pages", "rows")


@dataclass(frozen=True, repr=False)
class Plan:
    """A program on a target: `print` shows its `table`.

    Times are modelled from the schedule that XLA's compiler emits, not measured.
    """

    report: dict[str, Any]
    """Plain values, ready for JSON: see planner.report.make_report."""
    timeline: Timeline
    """The simulated step."""
    program: str
    """The text of XLA's scheduled program, for a short stack of the model's layers."""

    @property
    def step_us(self) -> float:
        """The time of a step, microseconds."""
        return self.report["totals"]["step_us"]

    @property
    def exposed_us(self) -> float:
        """The part of a step in which the device waits for communication."""
        return self.report["totals"]["exposed_us"]

    @property
    def fits(self) -> bool:
        """Whether a device has the memory for it."""
        return self.report["memory"]["fits"]

    def __repr__(self) -> str:
        row, totals = self.report, self.report["totals"]
        fits = "fits" if self.fits else "does not fit"
        return (
            f"Plan({row['workload']} of {row['layers']} layers, {row['schedule']}, "
            f"batch {row['batch']}, on {row['target']}: step {self.step_us:,.0f} us, "
            f"communication {totals['communication_us']:,.0f} us, of which the device "
            f"waits for {self.exposed_us:,.0f} us; {fits})"
        )

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The plan as text: a line a collective, the totals, the memory."""
        return plan_text(self.report)

    @property
    def collectives(self) -> list[dict[str, Any]]:
        """A row for every collective, such as pandas.DataFrame takes."""
        return self.report["collectives"]

    def figure(self, title: str | None = None) -> Any:
        """The timeline of two layers as a matplotlib Figure; see `lanes.figure`."""
        title = self.report["schedule"] if title is None else title
        return lanes.figure([(title, self.timeline)])


def plan(
    config: Config,
    target: str,
    workload: str = "decode",
    batch: int | None = None,
    *,
    context: int | None = None,
    residual: str | None = None,
    reduction: str | None = None,
    tensor: int | None = None,
    kv_layout: str = "auto",
    tokens: int | None = None,
) -> Plan:
    """Compiles the program of a config for a target, and plays its schedule on a clock.

    Args:
      config: the run's, such as `config.from_recipe` reads.
      target: a TPU slice, such as v5e:2x4, v6e:2x4, v5p:2x2x2 or tpu7x:2x2x1; or nodes
        x GPUs of a node, such as h100:1x8.
      workload: "decode" (one step), "prefill" or "train" (one step).
      batch: requests or sequences, over all devices. None: 1, or all that a training
        step of the config has, in its `grad_accum_steps` parts, with a fused attention
        kernel (planner/fused.py).
      context: tokens of the cache (decode), of a prompt (prefill) or of a sequence
        (train). None: 2048, or the model's max_length if that is less; the config's
        train.seq_len with a training step's own batch.
      residual: the residual schedule. None: the config's.
      reduction: the algorithm that sums partials. None: the config's.
      tensor: devices that share a block's work. None: the config's mesh.tensor.
      kv_layout: of decode's cache, see config.Decode: "auto", "pages" or "rows".
      tokens: that decode's requests have together. None: `context` each. Rows are read
        whole, of pages those that have tokens.

    Returns the Plan. In a notebook it shows the step's time; `print(plan)` shows every
    collective, `plan.figure()` draws two layers.

    Raises ConfigError where an argument is not accepted, the model does not fit the
    mesh, or XLA's compiler for the target is not installed (the extra [plan]). The
    compilers need a process in which JAX computes on the CPU: if JAX has not started,
    `plan` starts it there.
    """
    request = make_request(
        config,
        target,
        workload,
        batch,
        context=context,
        residual=residual,
        reduction=reduction,
        tensor=tensor,
        kv_layout=kv_layout,
        tokens=tokens,
    )
    aot.prepare()
    # JAX was imported before `prepare`.
    if not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")
    try:
        with aot.silence():
            return plan_of(request)
    except ConfigError as error:
        if "not implemented" not in str(error):
            raise
        # JAX looked for GPUs or TPUs when it started, and gave up their plugins.
        raise ConfigError(
            f"target={target!r} cannot be compiled for in this process, because JAX "
            "has started on other devices: set JAX_PLATFORMS=cpu before it starts"
        ) from None


def check_fit(requests: Sequence[Request]) -> None:
    """Raises ConfigError for the first request whose model does not fit its mesh."""
    for request in requests:
        devices = request.target.devices()
        mesh = make_mesh_for(request.config.mesh, devices, request.workload)
        sharding.check_fits(request.config.model, mesh, request.at_once)


def plan_of(request: Request) -> Plan:
    """The plan of a request."""
    compiled = build(request)
    timeline = make_timeline(compiled)
    return Plan(make_report(compiled, timeline), timeline, compiled.text)


def mixed_plan(request: Request, path: str) -> Plan:
    """The plan of a decode step over requests of mixed lengths, in rows.

    Its report has an entry more, "lengths", that compares rows and pages.

    Args:
      request: of the step; its context is not used.
      path: the file of the lengths, see planner.lengths.
    """
    require(request.workload == "decode", "lengths", path, "with decode alone")
    mixed = lengths.read(path, request.batch, request.config.model.max_length)
    model_config, devices = request.config.model, request.target.devices()
    mesh = make_mesh_for(request.config.mesh, devices, request.workload)
    has_kernel = kernel_of(model_config, mesh)[0] != "xla"
    requests = lengths.requests_of(request, mixed, has_kernel)
    plans = {layout: plan_of(one) for layout, one in requests.items()}
    reports = {layout: one.report for layout, one in plans.items()}
    report = reports["rows"] | dict(lengths=lengths.compare(mixed, reports))
    return dataclasses.replace(plans["rows"], report=report)


def drafted_plan(request: Request, count: int, accepted: float | None) -> Plan:
    """The plan of a decode step with `count` drafted tokens a request.

    Its report has an entry more, "drafts", that compares the step without them.

    Args:
      request: of the step.
      count: D.
      accepted: tokens that a pass gives a request, from 1 to 1 + D. None: 1 + D.
    """
    accepted = drafts.check(request, count, accepted)
    plain, drafted = plan_of(request), plan_of(request._replace(drafts=count))
    compared = drafts.compare(plain.report, drafted.report, count, accepted)
    report = drafted.report | dict(drafts=compared)
    return dataclasses.replace(drafted, report=report)


def make_request(
    config: Config,
    target: str,
    workload: str = "decode",
    batch: int | None = None,
    *,
    recipe: str = "config",
    context: int | None = None,
    residual: str | None = None,
    reduction: str | None = None,
    tensor: int | None = None,
    kv_layout: str = "auto",
    tokens: int | None = None,
) -> Request:
    """The `Request` of these arguments, which are those of `plan`.

    recipe: the name of the config in reports.
    """
    require(isinstance(config, Config), "config", config, "a ladder_jax.Config")
    require(isinstance(target, str), "target", target, "a text such as h100:1x8")
    require(workload in WORKLOADS, "workload", workload, f"one of {WORKLOADS}")
    parts, is_own_step = 1, batch is None and workload == "train"
    if is_own_step:
        batch, parts = config.train.global_batch, config.train.grad_accum_steps
        context = config.train.seq_len if context is None else context
    batch = 1 if batch is None else batch
    require(_whole(batch) and batch >= 1, "batch", batch, "1 or more")
    max_length = config.model.max_length
    context = min(2048, max_length) if context is None else context
    require(
        _whole(context) and 1 <= context <= max_length,
        "context",
        context,
        f"from 1 to model.max_length={max_length}",
    )
    require(kv_layout in LAYOUTS, "kv_layout", kv_layout, f"one of {LAYOUTS}")
    if tokens is not None:
        most = batch * context
        require(
            _whole(tokens) and batch <= tokens <= most,
            "tokens",
            tokens,
            f"from batch={batch} to batch x context={most}",
        )
    mesh_config, model_config = config.mesh, config.model
    if tensor is not None:
        mesh_config = Mesh(data=-1, tensor=tensor, reduction=mesh_config.reduction)
    if reduction is not None:
        mesh_config = dataclasses.replace(mesh_config, reduction=cast(Any, reduction))
    if residual is not None:
        model_config = dataclasses.replace(model_config, residual=residual)
    config = dataclasses.replace(config, model=model_config, mesh=mesh_config)
    return Request(
        recipe,
        config,
        aot.parse(target),
        workload,
        batch,
        context,
        kv_layout=kv_layout,
        tokens=tokens,
        parts=parts,
        fused=is_own_step,
    )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ---------------------------------------------------------------- a plan as text


def _where(row: dict[str, Any]) -> str:
    """A collective's block, and how many collectives XLA merged into it."""
    merged = f", {row['merged']} merged" if row["merged"] > 1 else ""
    return row["block"] + merged


COLLECTIVE_COLUMNS = [
    tables.Column("collective", lambda row: row["name"][-34:], left=True),
    tables.Column("kind", lambda row: row["kind"], left=True),
    tables.Column("axis", lambda row: row["axis"], left=True),
    tables.Column("bytes", tables.number("bytes", "")),
    tables.Column("x", tables.number("count", "g")),
    tables.Column("async", lambda row: "yes" if row["asynchronous"] else "no"),
    tables.Column("us", tables.number("communication_us", ".1f")),
    tables.Column("window", tables.number("window_compute_us", ".1f")),
    tables.Column("hidden", tables.number("hidden_us", ".1f")),
    tables.Column("exposed", tables.number("exposed_us", ".1f")),
    tables.Column("where", _where, left=True),
]


def _cache_lines(cache: dict[str, Any] | None) -> list[str]:
    """What a decode step reads of its cache; nothing for other programs."""
    if cache is None:
        return []
    read, alive = cache["tokens_read"], cache["tokens_alive"]
    line = (
        f"keys and values in {cache['layout']}: {read:,} tokens read for {alive:,} "
        f"alive ({read / alive:.2f} x)"
    )
    if cache["kernel"]:
        line += (
            f", by the kernel {cache['kernel']}: XLA does not estimate it, its time is "
            "that of HBM for the bytes it reads"
        )
    return [line]


def plan_text(report: dict[str, Any]) -> str:
    """The plan as text: one line for each collective, then the totals and the memory,
    and rows against pages if lengths are mixed, or what drafts change.

    Args:
      report: see report.make_report.
    """
    totals = ", ".join(
        f"{name.removesuffix('_us')} {value:,.1f}"
        for name, value in report["totals"].items()
    )
    sizes = ", ".join(
        f"{name.removesuffix('_bytes')} {value / 1e9:.2f}"
        for name, value in report["memory"].items()
        if name.endswith("_bytes")
    )
    return "\n".join(
        [
            f"{report['workload']} of {report['layers']} layers, "
            f"{report['schedule']}, {report['reduction']}, batch {report['batch']}, "
            f"context {report['context']}, on {report['target']}",
            tables.text_table(COLLECTIVE_COLUMNS, report["collectives"]),
            f"{totals} (us a step)",
            *_cache_lines(report.get("cache")),
            f"{sizes} (GB a device)",
            *use.lines(report),
            *use.source_lines(report["sources"]),
            *([lengths.text(report["lengths"])] if "lengths" in report else []),
            *([drafts.text(report["drafts"])] if "drafts" in report else []),
        ]
    )
