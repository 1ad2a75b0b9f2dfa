"""Residual schedules side by side on one machine: one table, one picture."""

import dataclasses
import json

from ladder_jax.config import ConfigError
from ladder_jax.planner import lanes, plan

# An all-reduce of a short message among 8 H100, as serving engines make it: SGLang 7.8 us, vLLM 11.8 us at 32 KiB
# (SGLang pull request 2904), where NCCL takes 24 us.
LOSSLESS = 7.8e-6


def variants(request):
    """(title, request, all_reduce) of everything that is compared."""
    layers, gpu = request.config.model.layers, not request.target.chip.is_tpu

    def of(schedule, reduction=request.config.mesh.reduction):
        config = request.config
        return request._replace(
            config=dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, residual=schedule),
                mesh=dataclasses.replace(config.mesh, reduction=reduction),
            )
        )

    return [
        ("standard, psum", of("standard", "psum"), None),
        (
            "standard, fastest lossless",
            of("standard", "psum" if gpu else "auto"),
            LOSSLESS if gpu else None,
        ),
        ("parallel", of("parallel"), None),
        ("ladder", of("ladder"), None),
        (f"hybrid:last{layers // 2}", of(f"hybrid:last{layers // 2}"), None),
        ("desync:2", of("desync:2"), None),
        ("no communication", of("upper-bound"), None),
    ]


def run(request, chosen):
    """What `ladder-jax plan --compare` prints."""
    if chosen.hlo:
        raise ConfigError("hlo goes with one program: leave out --compare")
    rows, timelines, compiled = [], [], {}
    for title, asked, all_reduce in variants(request):
        key = asked.config
        compiled[key] = made = compiled.get(key) or plan.build(asked)
        played = plan.read(made, all_reduce)
        rows.append(dict(variant=title, **plan.report(made, played)))
        timelines.append((title, played, plan.block_of))
    if chosen.plot:
        lanes.draw(chosen.plot, timelines)
    return json.dumps(rows) if chosen.json else table(rows)


def table(rows):
    """One line a variant; speed-ups are over the first."""
    first = rows[0]
    lines = [
        f"{first['workload']} of {first['recipe']} on {first['target']}, batch {first['batch']}, "
        f"context {first['context']}; us a step",
        f"{'':28} {'reduction':19} {'step':>10} {'compute':>10} {'sent':>9} {'hidden':>9} {'exposed':>9} "
        f"{'at least':>9} {'speed-up':>8}",
    ]
    for row in rows:
        t = row["totals"]
        lines.append(
            f"{row['variant']:28} {row['reduction']:19} {t['step_us']:10,.0f} {t['compute_us']:10,.0f} "
            f"{t['communication_us']:9,.0f} {t['hidden_us']:9,.0f} {t['exposed_us']:9,.0f} "
            f"{t['unavoidable_us']:9,.0f} {first['totals']['step_us'] / t['step_us']:8.3f}"
        )
    memory = first["memory"]
    needed = (
        memory["weights_bytes"] + memory["kv_bytes"] + memory["temporary_bytes"]
    ) / 1e9
    lines.append(
        f"{needed:.1f} of {memory['capacity_bytes'] / 1e9:.0f} GB a device: "
        + ("fits" if memory["fits"] else "does not fit")
    )
    return "\n".join(lines)
