"""The H100 cost model against the published measurements: `python -m ladder_jax.planner.calibrate` prints the tables.

What was measured is the reference implementation of Ladder Residual (arXiv 2501.06589; mayank31398/
ladder-residual-inference): float16, NCCL, CUDA graphs, 8 H100 with NVLink, prompts of 1024 tokens, 512 made. It is
modelled block by block; a step's time is

  block     = weights / (`hbm_efficiency` x HBM bandwidth) + OVERHEAD
  no comm.  = blocks + the replicated unembedding + batch x ROW x (elements of the repeated keys, relative to 70B's)
  standard  = no comm. + an all-reduce a block
  parallel  = no comm. + an all-reduce a layer
  ladder    = no comm. + what of a block's all-reduce is longer than the next block + `interference` x what is hidden

Six numbers come from 70B on 8 GPUs (the rows called calibration, and the communication derived from them): an
all-reduce of 16 KiB takes 24.0 us among 8 GPUs and 14.5 us among 4, one of 1 MiB 31.4 us (hence
`collective_launch_s`, `hop_latency_s` and `link_bandwidth` in chips.CHIPS["h100"]); OVERHEAD comes from the step without communication at
batch 1, ROW from the one at batch 64, `interference` (NCCL takes SMs and HBM bandwidth from the kernels beside it)
from ladder at all six batches, by least squares. Between nodes an all-reduce takes 47.2 us at 32 KiB and 79.7 us at
512 KiB (405B). `hbm_efficiency` is assumed. Everything else in the tables follows from these without round_up again.
"""

from typing import NamedTuple

from ladder_jax.hardware import chips, cost

CHIP = chips.CHIPS["h100"]
OVERHEAD = 13.7e-6  # seconds a block: launches, norms, rotary embedding, cache writes
ROW = 0.155e-3  # seconds a row of the batch: attention over repeated keys and values, with a full mask


class Model(NamedTuple):
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int


MODELS = {  # facts of the reference implementation's configurations
    "1B": Model(1536, 40, 24, 24, 4096, 49152),
    "3B": Model(2304, 40, 32, 32, 9216, 49152),
    "8B": Model(4096, 32, 32, 8, 14336, 128256),
    "34B": Model(8192, 48, 64, 8, 22016, 32000),
    "70B": Model(8192, 80, 64, 8, 28672, 128256),
    "176B": Model(14336, 70, 112, 112, 50176, 250880),
    "405B": Model(16384, 126, 128, 16, 53248, 128256),
}

# Speed-ups over standard, tokens a second. Calibration: 70B on 8 GPUs, by batch: ladder, parallel, no communication.
FIT = {
    1: (1.308, 1.217, 1.429),
    4: (1.282, 1.189, 1.376),
    8: (1.254, 1.170, 1.360),
    16: (1.190, 1.155, 1.316),
    32: (1.184, 1.136, 1.297),
    64: (1.155, 1.164, 1.275),
}
# Check. Ladder at batch 4 on 8 GPUs (405B: 16 in two nodes), NVLink; the logs' number where the table has another.
SIZES = {
    "1B": 1.557,
    "3B": 1.574,
    "8B": 1.462,
    "34B": 1.284,
    "70B": 1.285,
    "176B": 1.35,
    "405B": 1.31,
}
# Check. 405B on 16 GPUs in two nodes, by batch: ladder, parallel, no communication.
NODES = {
    1: (1.364, 1.238, 1.521),
    4: (1.308, 1.242, 1.512),
    8: (1.393, 1.286, 1.659),
    16: (1.349, 1.272, 1.632),
}
# All-reduces of 32 KiB among 8 H100 with NVLink, faster than NCCL's: SGLang's, vLLM's (SGLang pull request 2904).
LOSSLESS = (7.8e-6, 11.8e-6)


class Step(NamedTuple):
    """Seconds of a decode step."""

    standard: float
    ladder: float
    parallel: float
    bound: float


def step(model, gpus, batch, all_reduce=None):
    """The `Step` of a published model; `all_reduce`: seconds of a short one, where it is not NCCL's."""
    m = model
    width = m.dim // m.heads
    stream = lambda elements: 2 * elements / (CHIP.hbm_efficiency * CHIP.hbm_bandwidth)
    attention = stream(m.dim * (2 * m.dim + 2 * m.kv_heads * width) / gpus) + OVERHEAD
    mlp = stream(3 * m.dim * m.ffn / gpus) + OVERHEAD
    rows = batch * ROW * (m.heads * width * m.layers / gpus) / (64 * 128 * 80 / 8)
    attention += rows / m.layers
    bound = m.layers * (attention + mlp) + stream(m.dim * m.vocab)
    network = cost.Network(CHIP, [gpu // 8 for gpu in range(gpus)], all_reduce)
    reduce = network.collective(
        "all-reduce", [list(range(gpus))], batch * m.dim * 2
    ).seconds
    hidden = min(reduce, mlp) + min(reduce, attention)
    ladder = bound + m.layers * (2 * reduce - hidden + CHIP.interference * hidden)
    return Step(bound + 2 * m.layers * reduce, ladder, bound + m.layers * reduce, bound)


def rows():
    """(table, case, schedule, published speed-up, modelled speed-up) of every published number."""
    made = []
    for name, table, cases in (
        ("calibration, 70B", FIT, lambda batch: ("70B", 8, batch)),
        ("check, batch 4", SIZES, lambda size: (size, 16 if size == "405B" else 8, 4)),
        ("check, 405B in two nodes", NODES, lambda batch: ("405B", 16, batch)),
    ):
        for case, published in table.items():
            size, gpus, batch = cases(case)
            modelled = step(MODELS[size], gpus, batch)
            for schedule, value in zip(
                ("ladder", "parallel", "bound"),
                published if isinstance(published, tuple) else (published,),
            ):
                made.append(
                    (
                        name,
                        f"{size}, batch {batch}",
                        schedule,
                        value,
                        modelled.standard / getattr(modelled, schedule),
                    )
                )
    return made


def main():
    """Prints the tables as Markdown."""
    print("| | | | published | modelled | error |\n|---|---|---|---|---|---|")
    made = rows()
    for table, case, schedule, published, modelled in made:
        print(
            f"| {table} | {case} | {schedule} | {published:.3f} | {modelled:.3f} | {modelled / published - 1:+.1%} |"
        )
    for table in dict.fromkeys(row[0] for row in made):
        errors = [
            abs(modelled / published - 1)
            for name, _, _, published, modelled in made
            if name == table
        ]
        print(
            f"\n{table}: mean error {sum(errors) / len(errors):.1%}, largest {max(errors):.1%}"
        )
    print(
        "\n| 70B, 8 GPUs, batch | ladder over standard, NCCL | over standard, 11.8 us | over standard, 7.8 us |"
        "\n|---|---|---|---|"
    )
    for batch in FIT:
        ladder = step(MODELS["70B"], 8, batch).ladder
        over = [
            step(MODELS["70B"], 8, batch, fast).standard / ladder
            for fast in (None, *reversed(LOSSLESS))
        ]
        print(f"| {batch} | " + " | ".join(f"{value:.3f}" for value in over) + " |")


if __name__ == "__main__":
    main()
