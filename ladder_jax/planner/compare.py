"""Plans residual schedules side by side on one machine."""

import dataclasses
from typing import Any, NamedTuple

from ladder_jax.hardware import networks
from ladder_jax.planner import tables
from ladder_jax.planner.plan import Compiled, Request, build
from ladder_jax.planner.report import make_report, make_timeline
from ladder_jax.planner.timeline import Timeline

# Seconds of an all-reduce of 32 KiB among 8 H100 in serving engines: SGLang's kernel
# takes 7.8 us, vLLM's 11.8 us (SGLang pull request 2904), NCCL 24 us; NCCL's own over
# symmetric buffers 10 us (hardware/networks.py).
FASTEST_ALL_REDUCE = 7.8e-6


class Variant(NamedTuple):
    """A program to plan and compare with others."""

    title: str
    request: Request
    # Seconds of a short all-reduce. None: as the chip's network has it.
    all_reduce: float | None = None


class VariantPlan(NamedTuple):
    """The plan of a variant."""

    title: str
    report: dict[str, Any]  # see report.make_report
    timeline: Timeline


def variants(request: Request) -> list[Variant]:
    """The programs to compare; speed-ups are over the first one.

    "Fastest lossless" is the standard schedule with the fastest all-reduce that exists:
    on TPU the fastest of this project's reductions, on GPU the fastest kernel of other
    engines. "Symmetric buffers" is psum by NCCL over symmetric memory: XLA's
    option xla_gpu_experimental_enable_nccl_symmetric_buffers.
    """
    hybrid = f"hybrid:last{request.config.model.layers // 2}"
    reduction = request.config.mesh.reduction
    on_gpu = request.target.platform != "tpu"
    psum = with_schedule(request, "standard", "psum")
    symmetric = Variant("standard, symmetric buffers", psum, networks.SYMMETRIC_S)
    return [
        Variant("standard, psum", psum),
        *([symmetric] if on_gpu else []),
        Variant(
            "standard, fastest lossless",
            with_schedule(request, "standard", "psum" if on_gpu else "auto"),
            FASTEST_ALL_REDUCE if on_gpu else None,
        ),
        Variant("parallel", with_schedule(request, "parallel", reduction)),
        Variant("ladder", with_schedule(request, "ladder", reduction)),
        Variant(hybrid, with_schedule(request, hybrid, reduction)),
        Variant("desync:2", with_schedule(request, "desync:2", reduction)),
        Variant("dtp:1", with_schedule(request, "dtp:1", reduction)),
        Variant("no communication", with_schedule(request, "upper-bound", reduction)),
    ]


def with_schedule(request: Request, residual: str, reduction: Any) -> Request:
    """The request with another residual schedule and another reduction."""
    config = dataclasses.replace(
        request.config,
        model=dataclasses.replace(request.config.model, residual=residual),
        mesh=dataclasses.replace(request.config.mesh, reduction=reduction),
    )
    return request._replace(config=config)


def plan_variants(request: Request) -> list[VariantPlan]:
    """Plans all variants of a request. Variants with the same program share one
    compilation."""
    programs: dict[Any, Compiled] = {}
    plans = []
    for variant in variants(request):
        config = variant.request.config
        if config not in programs:
            programs[config] = build(variant.request)
        compiled = programs[config]
        timeline = make_timeline(compiled, variant.all_reduce)
        report = make_report(compiled, timeline)
        plans.append(VariantPlan(variant.title, report, timeline))
    return plans


def comparison_text(plans: list[VariantPlan]) -> str:
    """The comparison as text: one line for each variant, speed-ups over the first."""
    first = plans[0].report

    def speed_up(plan: VariantPlan) -> str:
        ratio = first["totals"]["step_us"] / plan.report["totals"]["step_us"]
        return f"{ratio:.3f}"

    columns = [
        tables.Column("us a step", lambda plan: plan.title, left=True),
        tables.Column("reduction", lambda plan: plan.report["reduction"], left=True),
        *(
            tables.Column(title, _microseconds(name))
            for title, name in (
                ("step", "step"),
                ("compute", "compute"),
                ("sent", "communication"),
                ("hidden", "hidden"),
                ("exposed", "exposed"),
                ("at least", "unavoidable"),
            )
        ),
        tables.Column("speed-up", speed_up),
    ]
    memory = first["memory"]
    parts = "weights_bytes", "kv_bytes", "temporary_bytes"
    needed = sum(memory[name] for name in parts) / 1e9
    fits = "fits" if memory["fits"] else "does not fit"
    return "\n".join(
        [
            f"{first['workload']} of {first['recipe']} on {first['target']}, "
            f"batch {first['batch']}, context {first['context']}",
            tables.text_table(columns, plans),
            f"{needed:.1f} of {memory['capacity_bytes'] / 1e9:.0f} GB a device: {fits}",
        ]
    )


def _microseconds(name: str) -> Any:
    """A cell with one of a plan's totals, such as "hidden"."""
    return lambda plan: f"{plan.report['totals'][f'{name}_us']:,.0f}"
