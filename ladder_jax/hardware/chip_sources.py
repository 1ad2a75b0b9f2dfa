"""Where each number of chips.CHIPS comes from.

The labels are: "measured" (by `bench device`, on the machine that the plan is for),
"published", "modelled" (fitted to published runs, or derived from them) and "assumed".
"""

from typing import NamedTuple

LABELS = ("measured", "published", "modelled", "assumed")


class Source(NamedTuple):
    """Where a number comes from."""

    label: str  # one of LABELS
    text: str


SHEETS = Source("published", "NVIDIA's data sheet, dense products")
LINKS = Source(
    "published", "Google Cloud's TPU pages; 90%: scaling-book, table of links"
)
GOOGLE = Source("published", "Google Cloud's TPU pages")
FITTED = Source("modelled", "planner/calibrate.py: 70B on 8 H100, published runs")
NODES = Source("modelled", "planner/calibrate.py: 405B on 16 H100, published runs")
MARIN = Source("published", "marin's report of GPU hardware targets, JAX, 2026-07-07")
SYMMETRIC = Source("published", "vLLM pull request 42324: multimem all-reduce, 8 H100")
GATHER = Source("published", "Megatron-LM pull request 5596: NCCL's all-gather, 8 H100")
AS_H100 = Source("assumed", "as H100")
NO_NVLINK_FIGURE = Source("assumed", "twice H100's, as NVLink is twice as fast")

TPU = {
    "peak_flops": GOOGLE,
    "hbm_bandwidth": GOOGLE,
    "hbm_bytes": GOOGLE,
    "link_bandwidth": LINKS,
    "hop_latency_s": Source("published", "scaling-book: about a microsecond a hop"),
    "collective_launch_s": Source("assumed", "a hop"),
    "clock_hz": Source("modelled", "peak over FLOPs a cycle of the matrix units"),
    "async_all_reduce_min_bytes": Source("modelled", "XLA's schedules: docs/log.md"),
    "slice_bandwidth": Source("published", "scaling-book: 25 GB/s a host"),
}
H100 = {
    "peak_flops": SHEETS,
    "hbm_bandwidth": SHEETS,
    "hbm_bytes": SHEETS,
    "link_bandwidth": FITTED,
    "hop_latency_s": FITTED,
    "collective_launch_s": FITTED,
    "internode_bandwidth": NODES,
    "internode_latency_s": NODES,
    "long_all_reduce": FITTED,
    "long_gather": GATHER,
    "long_internode": Source(
        "published", "marin's report, 16 H100: bandwidth; latency assumed: H100's"
    ),
    "nic_bandwidth": Source("published", "NVIDIA's DGX H100: 400 Gb/s for each GPU"),
    "symmetric_bandwidth": SYMMETRIC,
    "kernel_launch_s": Source(
        "modelled",
        "25 us a layer of 70B at batch 1 (planner/reference.py) over about 11 kernels",
    ),
    "hbm_efficiency": MARIN,
    "product_efficiency": MARIN,
    "interference": FITTED,
    "product_interference": FITTED,
    "cores": SHEETS,
    "domain": SHEETS,
}
GPU_AS_H100 = dict.fromkeys(H100, AS_H100) | dict.fromkeys(
    ("peak_flops", "hbm_bandwidth", "hbm_bytes", "cores", "domain"), SHEETS
)
BLACKWELL = GPU_AS_H100 | {
    "link_bandwidth": Source("published", "vLLM pull request 37756: NCCL, B300"),
    "long_all_reduce": Source(
        "published", "marin's report, 8 B200: bandwidth; vLLM 37756, B300: latency"
    ),
    "long_gather": NO_NVLINK_FIGURE,
    "symmetric_bandwidth": NO_NVLINK_FIGURE,
    "hbm_efficiency": MARIN,
    "product_efficiency": MARIN,
}
SOURCES: dict[str, dict[str, Source]] = {
    "v5e": TPU,
    "v6e": TPU,
    "v5p": TPU,
    "tpu7x": TPU,
    "h100": H100,
    "h100-pcie": GPU_AS_H100,
    "h100-nvl": GPU_AS_H100,
    "h200": GPU_AS_H100,
    "b200": BLACKWELL,
    "gb200": BLACKWELL,
}


def sources_of(
    kind: str, changes: dict[str, Source] | None = None
) -> dict[str, Source]:
    """The source of each of a chip's numbers, by field of chips.Chip.

    Args:
      kind: its name in CHIPS.
      changes: of the numbers that another network or a calibration changed.
    """
    return SOURCES.get(kind, {}) | (changes or {})
