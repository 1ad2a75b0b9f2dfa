"""XLA's compiler options, by platform, chip and workload."""

from typing import Any

from ladder_jax.hardware import chips

# By platform ("gpu": both kinds; others of "gpu": see `merging`), by chip, and by
# chip and workload. Later rows win.
OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {
        # The pass removes optimization barriers. Without barriers, XLA moves values
        # that were computed once before a loop into every iteration, and merges a
        # recomputation (remat) with the values that it replaces.
        "xla_disable_hlo_passes": "cse_barrier_expander",
    },
    "tpu": {
        # 0: XLA merges no reductions. By default it merges those of attention and MLP,
        # which then start after both blocks, with no compute left to hide them.
        "xla_jf_crs_combiner_threshold_in_bytes": "0",
        # By default XLA moves the cross-entropy's gather to v5p's SparseCores, and JAX
        # cannot read the compiled program back then ("async-update instruction should
        # have 1 operands but sees 3").
        "xla_tpu_offload_gather_to_sparsecore": "false",
        # SparseCores (v5p, v6e, TPU7x) run all-reduces of 64 KiB and more
        # asynchronously. XLA's estimate of their time is far too short, and without the
        # multiplier they start too late. 0: XLA does not load SparseCore programs ahead
        # of time; else JAX cannot read the compiled program back, as above.
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
        "xla_tpu_sparse_core_all_reduce_latency_multiplier": "20",
        "xla_tpu_sparse_core_maximum_preloaded_async_calls": "0",
    },
    "v5e": {
        # v5e has no SparseCores. XLA can fuse parts of a long all-reduce into the
        # matrix products that hide it; it refuses to for other TPUs.
        "xla_enable_async_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    },
    "v5e decode": {
        # Without it, XLA may never finish compiling two layers that are not in a scan.
        "xla_tpu_async_collective_fusion_with_start_done_only": "true",
    },
    "v5e prefill": {
        "xla_tpu_async_collective_fusion_with_start_done_only": "true",  # as above
        # Halves XLA's estimate of a product's time. XLA then fuses a long all-reduce
        # into two products, because one is too short.
        "xla_lhs_output_fusion_latency_multiplier": "0.5",
    },
    "gpu": {
        # 0: XLA merges no reductions, as on TPU: psum, one-shot, exchanges.
        "xla_gpu_all_reduce_combine_threshold_bytes": 0,
        "xla_gpu_all_gather_combine_threshold_bytes": 0,
        "xla_gpu_collective_permute_combine_threshold_bytes": 0,
        # Moves a reduction's wait down to the first reader of its result; without it
        # the wait follows the start.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # XLA's default estimate of a reduction's time is far below NCCL's, so the
        # reduction starts late and one product hides it. Without this estimate the
        # scheduler expects it to take several products, and it starts with its block.
        "xla_gpu_enable_analytical_sol_latency_estimator": False,
        # XLA merges matrix products that read the same array by concatenating their
        # weights. Where it cannot fuse the concatenation (schedule parallel, batch 16:
        # 138 MB a layer), it copies the weights in every step. 0 turns the merge off;
        # this makes ladder 1% slower where XLA could fuse the concatenation.
        "xla_gpu_dot_merger_threshold_mb": 0,
        # The pass makes a product of one row a multiplication and a sum. Where several
        # products read the row, XLA writes the float32 terms of all to memory: 8B at
        # batch 1 on 8 H100 computes for 4,134 us with it and for 2,458 without.
        "xla_disable_hlo_passes": "dot-strength-reduction",
    },
    "gpu gathers": {
        # XLA merges the gathers of a layer's parameters into one. 0 would keep 7.
        "xla_gpu_all_gather_combine_threshold_bytes": 300_000_000,
    },
    "gpu scatters": {
        # 0: XLA merges no scatters of a stream (residual/sequence.py).
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 0,
    },
}


def options(mesh: Any, workload: str | None = None) -> dict[str, Any]:
    """XLA's options for programs on a mesh: `jax.jit`'s compiler_options.

    Args:
      mesh: a jax.sharding.Mesh.
      workload: "decode" or "prefill" for the engine's programs, whose layers are a
        list; None for all other programs.
    """
    kind = chips.kind_of(mesh.devices.flat[0])
    return options_of(chips.platform(mesh), kind, workload, merging(mesh))


def merging(mesh: Any) -> str:
    """What XLA:GPU merges beside its defaults: "gathers" or not "scatters", or "".

    Without a tensor axis all gathers are of parameters, over the fsdp axis; with one,
    some are reductions, each of which has its own block beside it. Without an fsdp axis
    all scatters are reductions; with one, some are of gradients.
    """
    has_fsdp, has_tensor = mesh.shape["fsdp"] > 1, mesh.shape["tensor"] > 1
    if has_fsdp == has_tensor:
        return ""
    return "gathers" if has_fsdp else "scatters"


def options_of(
    platform: str, kind: str | None, workload: str | None = None, merging: str = ""
) -> dict[str, Any]:
    """XLA's options for a platform (`chips.platform`) and a chip's name in CHIPS."""
    family = "gpu" if platform in chips.GPUS else platform
    rows = (family, f"{family} {merging}", kind or "", f"{kind} {workload}")
    return {name: value for row in rows for name, value in OPTIONS.get(row, {}).items()}
