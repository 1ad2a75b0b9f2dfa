"""What a plan is worth: tokens a second, share of the peak, cost, the largest batch."""

from typing import Any

from ladder_jax.planner.plan import Compiled

MILLION = 1e6


def tokens_of(workload: str, batch: int, context: int) -> int:
    """Tokens of a step: new ones in decode, all in a prefill or a training step."""
    return batch if workload == "decode" else batch * context


def use_of(
    compiled: Compiled, step_s: float, flops: float, memory: dict[str, Any]
) -> dict[str, Any]:
    """What a program gives, ready for JSON.

    Args:
      compiled: the program.
      step_s: seconds of its step.
      flops: of the matrix products of a step, over all devices.
      memory: the entry of the report.
    """
    request, mesh = compiled.request, compiled.mesh
    tokens = tokens_of(request.workload, request.batch, request.context)
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    return dict(
        devices=mesh.size,
        tokens=tokens,
        tokens_per_s=tokens / step_s,
        tokens_per_s_device=tokens / step_s / mesh.size,
        # Of a request: decode alone gives it one token a step.
        tokens_per_s_request=tokens / request.batch / step_s,
        mfu=flops / step_s / mesh.size / request.target.chip.peak_flops,
        largest_batch=largest_batch(memory, request.at_once, replicas) * request.parts,
    )


def largest_batch(memory: dict[str, Any], batch: int, replicas: int) -> int:
    """The largest batch that fits, a multiple of the replicas; 0 if none does.

    Keys and values, and the temporaries, grow with the batch. A part of the temporaries
    does not, so that a larger batch may fit.

    Args:
      memory: the entry of a plan's report.
      batch: of that plan.
      replicas: devices, or groups of them, that compute different rows.
    """
    grows = memory["kv_bytes"] + memory["temporary_bytes"]
    room = memory["capacity_bytes"] - memory["weights_bytes"]
    if room <= 0:
        return 0
    rows = int(room * batch / max(grows, 1))
    return rows // replicas * replicas


def cost_of_million(use: dict[str, Any], price: float) -> float:
    """What a million tokens cost where an hour of a device costs `price`."""
    return price * use["devices"] / 3600 / use["tokens_per_s"] * MILLION


NO_OVERLAP = (
    "XLA:GPU runs every reduction without computation beside it here: parameters and "
    "cache take more than 80% of the memory that the driver reports; a smaller batch "
    "or context, or more devices, leave room"
)


def lines(report: dict[str, Any]) -> list[str]:
    """The plan's use as text: its speed, its cost, whether it fits."""
    use, memory = report["use"], report["memory"]
    needed = sum(
        memory[name] for name in ("weights_bytes", "kv_bytes", "temporary_bytes")
    )
    sizes = f"{needed / 1e9:.1f} of {memory['capacity_bytes'] / 1e9:.0f} GB a device"
    verdict = "fits" if memory["fits"] else "does not fit"
    speed = (
        f"{use['tokens_per_s']:,.0f} tokens/s, {use['tokens_per_s_device']:,.0f} a "
        f"device, MFU {use['mfu']:.1%} (modelled)"
    )
    if "cost_per_million" in use:
        speed += (
            f"; {use['cost_per_million']:,.2f} a million tokens at {use['price']:g} "
            "an hour of a device"
        )
    end = f"{verdict}: {sizes}; the largest batch that fits is {use['largest_batch']:,}"
    return [speed, end, *([] if memory["overlaps"] else [NO_OVERLAP])]


def source_lines(sources: dict[str, dict[str, str]]) -> list[str]:
    """Which of the chip's numbers are measured, published, modelled or assumed."""
    by_label: dict[str, list[str]] = {}
    for field, source in sources.items():
        by_label.setdefault(source["label"], []).append(field)
    parts = [f"{label}: {', '.join(names)}" for label, names in by_label.items()]
    return [f"the chip's numbers: {'; '.join(parts)}"] if parts else []
