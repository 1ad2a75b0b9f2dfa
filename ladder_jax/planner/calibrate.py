"""Compares this project's H100 cost model with published measurements:
`python -m ladder_jax.planner.calibrate` prints the tables.

The measurements are of the reference implementation of Ladder Residual
(arXiv 2501.06589; mayank31398/ladder-residual-inference): float16, NCCL, CUDA graphs,
8 H100 with NVLink, prompts of 1024 tokens, 512 new tokens. The cost model adds up the
seconds of a decode step from those of its blocks:

  block     = weights / (`hbm_efficiency` x HBM bandwidth) + OVERHEAD
  no comm.  = blocks + the replicated unembedding
              + batch x ROW x (elements of the repeated keys, relative to 70B's)
  standard  = no comm. + an all-reduce a block
  parallel  = no comm. + an all-reduce a layer
  ladder    = no comm. + the part of a block's all-reduce that the next block does not
              cover + `interference` x the part that it covers

Six numbers are fitted to 70B on 8 GPUs (the rows called calibration, and the
communication times that follow from them). An all-reduce of 16 KiB takes 24.0 us among
8 GPUs and 14.5 us among 4, one of 1 MiB 31.4 us: they give `collective_launch_s`,
`hop_latency_s` and `link_bandwidth` of chips.CHIPS["h100"]. OVERHEAD comes from the
step without communication at batch 1, ROW from the one at batch 64. `interference`
(NCCL takes SMs and HBM bandwidth from the kernels beside it) comes from ladder at all
six batches, by least squares. Between nodes an all-reduce takes 47.2 us at 32 KiB and
79.7 us at 512 KiB (405B). `hbm_efficiency` is assumed. Nothing else in the tables is
fitted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ladder_jax.hardware import chips, cost
from ladder_jax.planner import tables

CHIP = chips.CHIPS["h100"]
OVERHEAD = 13.7e-6  # seconds a block: launches, norms, rotary embedding, cache writes
# Seconds for each row of the batch: the reference repeats keys and values for every
# query head, and its attention reads a full mask.
ROW = 0.155e-3


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

# Published ratios of tokens a second to those of standard: for ladder, for parallel and
# without communication. Calibration: 70B on 8 GPUs, by batch.
FIT = {
    1: (1.308, 1.217, 1.429),
    4: (1.282, 1.189, 1.376),
    8: (1.254, 1.170, 1.360),
    16: (1.190, 1.155, 1.316),
    32: (1.184, 1.136, 1.297),
    64: (1.155, 1.164, 1.275),
}
# Check: ladder at batch 4 on 8 GPUs (405B: 16 in two nodes) with NVLink. Where the
# published table and the published logs differ, this is the logs' number.
SIZES = {
    "1B": 1.557,
    "3B": 1.574,
    "8B": 1.462,
    "34B": 1.284,
    "70B": 1.285,
    "176B": 1.35,
    "405B": 1.31,
}
# Check: 405B on 16 GPUs in two nodes, by batch.
NODES = {
    1: (1.364, 1.238, 1.521),
    4: (1.308, 1.242, 1.512),
    8: (1.393, 1.286, 1.659),
    16: (1.349, 1.272, 1.632),
}
# Seconds of an all-reduce of 32 KiB among 8 H100 with NVLink, by SGLang's and by vLLM's
# kernel (SGLang pull request 2904).
LOSSLESS_ALL_REDUCES = (7.8e-6, 11.8e-6)


class Step(NamedTuple):
    """Seconds of a decode step, by schedule."""

    standard: float
    ladder: float
    parallel: float
    bound: float  # no communication


class Row(NamedTuple):
    """A published number beside the modelled one."""

    table: str
    case: str
    schedule: str
    published: float  # speed-ups over standard
    modelled: float

    @property
    def error(self) -> float:
        return self.modelled / self.published - 1


def model_step(
    model: Model, gpus: int, batch: int, all_reduce: float | None = None
) -> Step:
    """The modelled `Step` of a published model.

    Args:
      model: the model.
      gpus: tensor-parallel GPUs, 8 a node.
      batch: rows.
      all_reduce: seconds of a short all-reduce. None: NCCL's.
    """
    head_dim = model.dim // model.heads

    def read_seconds(weights: float) -> float:
        """Seconds to read so many float16 weights from HBM."""
        return 2 * weights / (CHIP.hbm_efficiency * CHIP.hbm_bandwidth)

    projections = model.dim * (2 * model.dim + 2 * model.kv_heads * head_dim)
    attention = read_seconds(projections / gpus) + OVERHEAD
    mlp = read_seconds(3 * model.dim * model.ffn / gpus) + OVERHEAD
    keys = model.heads * head_dim * model.layers / gpus
    keys_of_70b = 64 * 128 * 80 / 8
    attention += batch * ROW * keys / keys_of_70b / model.layers
    unembedding = read_seconds(model.dim * model.vocab)
    bound = model.layers * (attention + mlp) + unembedding
    network = cost.Network(CHIP, [gpu // 8 for gpu in range(gpus)], all_reduce)
    group, message_bytes = list(range(gpus)), 2 * batch * model.dim
    reduction = network.collective("all-reduce", [group], message_bytes).seconds
    # Of a layer: its attention's reduction runs during its MLP, and so on.
    hidden = min(reduction, mlp) + min(reduction, attention)
    slowdown = CHIP.interference * hidden
    return Step(
        standard=bound + 2 * model.layers * reduction,
        ladder=bound + model.layers * (2 * reduction - hidden + slowdown),
        parallel=bound + model.layers * reduction,
        bound=bound,
    )


def rows() -> list[Row]:
    """Every published number, with the modelled one."""
    return [
        *_rows("calibration, 70B", FIT, lambda batch: ("70B", 8, batch)),
        *_rows(
            "check, batch 4", SIZES, lambda size: (size, 16 if size == "405B" else 8, 4)
        ),
        *_rows("check, 405B in two nodes", NODES, lambda batch: ("405B", 16, batch)),
    ]


def _rows(
    table: str,
    cases: dict[Any, Any],
    setting: Callable[[Any], tuple[str, int, int]],
) -> list[Row]:
    """The rows of one table.

    Args:
      table: its title.
      cases: the published speed-ups of every case.
      setting: a case -> the name of its model, its GPUs, its batch.
    """
    rows = []
    for case, published in cases.items():
        size, gpus, batch = setting(case)
        step = model_step(MODELS[size], gpus, batch)
        values = published if isinstance(published, tuple) else (published,)
        for schedule, value in zip(("ladder", "parallel", "bound"), values):
            modelled = step.standard / getattr(step, schedule)
            rows.append(Row(table, f"{size}, batch {batch}", schedule, value, modelled))
    return rows


COLUMNS = [
    tables.Column("table", lambda row: row.table, left=True),
    tables.Column("case", lambda row: row.case, left=True),
    tables.Column("schedule", lambda row: row.schedule, left=True),
    tables.Column("published", lambda row: f"{row.published:.3f}"),
    tables.Column("modelled", lambda row: f"{row.modelled:.3f}"),
    tables.Column("error", lambda row: f"{row.error:+.1%}"),
]


def _ladder_over_standard(name: str, all_reduce: float | None) -> tables.Column:
    """A column with the speed-up, by batch, of ladder with NCCL over standard with
    another all-reduce."""

    def cell(batch: int) -> str:
        ladder = model_step(MODELS["70B"], 8, batch).ladder
        standard = model_step(MODELS["70B"], 8, batch, all_reduce).standard
        return f"{standard / ladder:.3f}"

    return tables.Column(name, cell)


def markdown() -> str:
    """The tables in Markdown."""
    all_rows = rows()
    parts = [tables.markdown_table(COLUMNS, all_rows)]
    for table in dict.fromkeys(row.table for row in all_rows):
        errors = [abs(row.error) for row in all_rows if row.table == table]
        mean = sum(errors) / len(errors)
        parts.append(f"{table}: mean error {mean:.1%}, largest {max(errors):.1%}")
    columns_by_batch = [
        tables.Column("70B, 8 GPUs, batch", str),
        _ladder_over_standard("ladder over standard, NCCL", None),
        _ladder_over_standard("over standard, 11.8 us", LOSSLESS_ALL_REDUCES[1]),
        _ladder_over_standard("over standard, 7.8 us", LOSSLESS_ALL_REDUCES[0]),
    ]
    parts.append(tables.markdown_table(columns_by_batch, FIT))
    return "\n\n".join(parts)


def page() -> str:
    """The text of docs/overlap/published.md."""
    return (
        "# The H100 model beside the published numbers\n\n"
        "Speed-ups over the standard schedule.\n"
        "`python -m ladder_jax.planner.calibrate` prints these tables; its docstring\n"
        "says which numbers are fitted and to what. The model is of the reference\n"
        "implementation, not of this project.\n\n" + markdown() + "\n"
    )


if __name__ == "__main__":
    print(markdown())
