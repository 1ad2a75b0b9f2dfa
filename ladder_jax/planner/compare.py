"""Plans residual schedules side by side on one machine."""

import dataclasses
from typing import Any, NamedTuple

from ladder_jax.planner import tables
from ladder_jax.planner.plan import Compiled, Request, build
from ladder_jax.planner.report import make_report, make_timeline
from ladder_jax.planner.timeline import Timeline

# Seconds of an all-reduce of 32 KiB among 8 H100 in serving engines: SGLang's kernel
# takes 7.8 us, vLLM's 11.8 us (SGLang pull request 2904), NCCL 24 us.
FASTEST_ALL_REDUCE = 7.8e-6


class Variant(NamedTuple):
    """One of the plans that are compared."""

    title: str
    request: Request
    all_reduce: float | None = None  # seconds of a short one, where it is not NCCL's


class Planned(NamedTuple):
    """A variant that has been planned."""

    title: str
    report: dict[str, Any]
    timeline: Timeline


def variants(request: Request) -> list[Variant]:
    """The plans to compare; the first is the one that speed-ups refer to.

    "Fastest lossless" is the standard schedule with the fastest all-reduce there is: of
    this project's reductions on TPU, of other engines' kernels on GPU.
    """
    half = f"hybrid:last{request.config.model.layers // 2}"
    own = request.config.mesh.reduction
    on_gpu = request.target.platform != "tpu"
    return [
        Variant("standard, psum", with_schedule(request, "standard", "psum")),
        Variant(
            "standard, fastest lossless",
            with_schedule(request, "standard", "psum" if on_gpu else "auto"),
            FASTEST_ALL_REDUCE if on_gpu else None,
        ),
        Variant("parallel", with_schedule(request, "parallel", own)),
        Variant("ladder", with_schedule(request, "ladder", own)),
        Variant(half, with_schedule(request, half, own)),
        Variant("desync:2", with_schedule(request, "desync:2", own)),
        Variant("no communication", with_schedule(request, "upper-bound", own)),
    ]


def with_schedule(request: Request, residual: str, reduction: Any) -> Request:
    """The request with another residual schedule and another reduction."""
    whole = request.config
    return request._replace(
        config=dataclasses.replace(
            whole,
            model=dataclasses.replace(whole.model, residual=residual),
            mesh=dataclasses.replace(whole.mesh, reduction=reduction),
        )
    )


def plan_variants(request: Request) -> list[Planned]:
    """Plans all variants of a request. Variants of one program compile it once."""
    programs: dict[Any, Compiled] = {}
    planned = []
    for title, wanted, all_reduce in variants(request):
        compiled = programs.get(wanted.config)
        if compiled is None:
            compiled = programs[wanted.config] = build(wanted)
        played = make_timeline(compiled, all_reduce)
        planned.append(Planned(title, make_report(compiled, played), played))
    return planned


def comparison_text(planned: list[Planned]) -> str:
    """The comparison as text: a line a variant, speed-ups over the first."""
    first = planned[0].report
    columns = [
        tables.Column("us a step", lambda one: one.title, left=True),
        tables.Column("reduction", lambda one: one.report["reduction"], left=True),
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
        tables.Column(
            "speed-up",
            lambda one: (
                f"{first['totals']['step_us'] / one.report['totals']['step_us']:.3f}"
            ),
        ),
    ]
    memory = first["memory"]
    parts = "weights_bytes", "kv_bytes", "temporary_bytes"
    needed = sum(memory[name] for name in parts) / 1e9
    fits = "fits" if memory["fits"] else "does not fit"
    return "\n".join(
        [
            f"{first['workload']} of {first['recipe']} on {first['target']}, "
            f"batch {first['batch']}, context {first['context']}",
            tables.text_table(columns, planned),
            f"{needed:.1f} of {memory['capacity_bytes'] / 1e9:.0f} GB a device: {fits}",
        ]
    )


def _microseconds(name: str) -> Any:
    return lambda one: f"{one.report['totals'][f'{name}_us']:,.0f}"
