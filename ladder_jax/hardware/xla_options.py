"""How XLA is told to build programs, by platform, kind of chip and workload."""

from ladder_jax.hardware import chips

# Options of XLA by platform and by kind of device, for every program of the model or for one workload's.
OPTIONS = {
    "cpu": {
        # Drops optimization barriers, and with them what they are for: values that are computed once and not again in
        # every loop that reads them, recomputation that is not merged with what it is to repeat.
        "xla_disable_hlo_passes": "cse_barrier_expander",
    },
    "tpu": {
        # XLA merges reductions that are ready together. Those of attention and MLP then wait for the later of the two,
        # with nothing left to run behind them.
        "xla_jf_crs_combiner_threshold_in_bytes": "0",
        # XLA moves the cross-entropy's gather to v5p's SparseCores, and the program that it then hands out cannot be
        # read back ("async-update instruction should have 1 operands but sees 3").
        "xla_tpu_offload_gather_to_sparsecore": "false",
        # SparseCores (v5p, v6e, TPU7x) make all-reduces of 64 KiB and more, which are asynchronous then. XLA takes them
        # for far shorter than they are, and starts them too late. Where it loads their programs ahead of time, the
        # whole cannot be read back, as above.
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
        "xla_tpu_sparse_core_all_reduce_latency_multiplier": "20",
        "xla_tpu_sparse_core_maximum_preloaded_async_calls": "0",
    },
    "v5e": {
        # It has no SparseCores, but XLA can fuse parts of an all-reduce into the products that it is to run behind. It
        # does so for long messages, if asked to, and refuses to for other TPUs.
        "xla_enable_async_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    },
    "v5e decode": {
        # Without it two layers that are written out one after another, not in a scan, may compile for ever.
        "xla_tpu_async_collective_fusion_with_start_done_only": "true",
    },
    "v5e prefill": {
        "xla_tpu_async_collective_fusion_with_start_done_only": "true",  # as for decode
        # Products count for half, so that long all-reduces are fused into two of them: one is too short.
        "xla_lhs_output_fusion_latency_multiplier": "0.5",
    },
    "gpu": {
        "xla_gpu_all_reduce_combine_threshold_bytes": 0,  # as on TPU
        "xla_gpu_all_gather_combine_threshold_bytes": 0,  # the same for one-shot
        "xla_gpu_collective_permute_combine_threshold_bytes": 0,  # and for reductions made of exchanges
        # Moves a reduction's wait down to the first reader of its result; without it the wait follows the start.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # XLA's default estimate of a reduction's time is far below NCCL's, so that it starts late, behind one product.
        # Without this estimate the scheduler takes it for as long as several products, and it starts with its block.
        "xla_gpu_enable_analytical_sol_latency_estimator": False,
        # XLA merges matrix products that read the same array by concatenating their weights, and where it cannot fuse
        # that (parallel at batch 16: 138 MB a layer) it copies them in every step. Costs ladder 1% where it could.
        "xla_gpu_dot_merger_threshold_mb": 0,
    },
}


def options(mesh, workload=None):
    """The options of XLA for programs on a mesh: `jax.jit`'s compiler_options. `workload`: "decode" or "prefill" of the
    engine, whose layers are a list; None for any other."""
    device = mesh.devices.flat[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return options_of(platform, chips.kind_of(device), workload)


def options_of(platform, kind, workload):
    return (
        OPTIONS.get(platform, {})
        | OPTIONS.get(kind, {})
        | OPTIONS.get(f"{kind} {workload}", {})
    )
