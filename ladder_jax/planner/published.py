"""Published measurements of the reference implementation of Ladder Residual.

arXiv 2501.06589; mayank31398/ladder-residual-inference: float16, NCCL, 8 H100 of a
node, prompts of 1024 tokens, 512 new tokens. planner/reference.py models this program.
"""

from typing import NamedTuple


class Model(NamedTuple):
    """A published model."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int


# From the reference implementation's configurations.
MODELS = {
    "1B": Model(1536, 40, 24, 24, 4096, 49152),
    "3B": Model(2304, 40, 32, 32, 9216, 49152),
    "8B": Model(4096, 32, 32, 8, 14336, 128256),
    "34B": Model(8192, 48, 64, 8, 22016, 32000),
    "70B": Model(8192, 80, 64, 8, 28672, 128256),
    "176B": Model(14336, 70, 112, 112, 50176, 250880),
    "405B": Model(16384, 126, 128, 16, 53248, 128256),
}
PROMPT, NEW_TOKENS = 1024, 512


class Times(NamedTuple):
    """A number for each schedule. Seconds, or tokens a second."""

    standard: float
    ladder: float
    parallel: float
    desync: float  # desync:2
    bound: float  # no communication


# 70B on 8 GPUs, by batch. Tokens a second of a prompt's prefill and all new tokens;
# torch.compile, attention without a kernel.
TOKENS_PER_SECOND = {
    1: Times(77.39, 101.23, 94.22, 91.25, 110.59),
    4: Times(258.56, 331.47, 307.34, 298.86, 355.80),
    8: Times(475.04, 595.65, 555.88, 542.26, 646.18),
    16: Times(843.15, 1003.35, 973.74, 957.31, 1109.65),
    32: Times(1312.26, 1553.72, 1490.86, 1456.34, 1702.48),
    64: Times(1940.99, 2241.84, 2259.38, 2186.12, 2474.49),
}
# The same, seconds of a prefill: with flash attention and CUDA graphs, by batch.
PREFILL = {
    1: Times(69.1e-3, 62.2e-3, 61.2e-3, 58.9e-3, 46.7e-3),
    4: Times(215.6e-3, 187.3e-3, 184.8e-3, 194.9e-3, 162.2e-3),
    16: Times(819e-3, 707e-3, 723e-3, 745e-3, 638.7e-3),
}
PREFILL_BOUND_64 = 2.568  # batch 64, without communication
# The same at batch 1, compiled, attention without a kernel: no row of desync:2.
COMPILED_PREFILL = {
    "standard": 81.2e-3,
    "ladder": 76.5e-3,
    "parallel": 76.8e-3,
    "bound": 56.4e-3,
}

# Rows that nothing is fitted to. Tokens a second of standard and ladder at batch 4 on 8
# GPUs. Where the published table and the published logs differ, the logs' number.
SIZES = {
    "1B": (973.81, 1516.60),
    "3B": (904.42, 1423.89),
    "8B": (888.63, 1299.42),
    "34B": (436.76, 560.76),
    "70B": (254.17, 326.72),
}
SPEED_UP_176B = 1.35  # of ladder, batch 4
# 405B on 16 GPUs in two nodes, by batch: speed-ups of ladder, parallel, bound.
NODES = {
    1: (1.364, 1.238, 1.521),
    4: (1.308, 1.242, 1.512),
    8: (1.393, 1.286, 1.659),
    16: (1.349, 1.272, 1.632),
}
# 405B on 16 GPUs, batch 1: tokens a second; no row of parallel.
NODES_BATCH_1 = dict(standard=28.46, ladder=38.82, desync=33.13, bound=43.28)
# Speed-ups of ladder at batch 4 with NCCL_P2P_DISABLE=1: no GPU reads another's memory.
WITHOUT_NVLINK = {"1B": 1.39, "3B": 1.50, "8B": 1.398, "34B": 1.571, "70B": 1.566}
