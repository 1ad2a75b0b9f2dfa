"""Models the reference implementation's program: seconds of its decode step and of its
prefill.

It is another program than this project's. Keys and values are repeated for every query
head, attention reads a full mask, the unembedding is replicated and, in prefill,
computes all positions; products are cuBLAS's, at 590 TFLOP/s where they are long. With
`t` the seconds of a block's all-reduce:

  block     = max(weights / HBM, products) + passes over the activations
              + `Fitted.kernels_s`, + attention
  bound     = blocks + unembedding
  standard  = bound + 2 t a layer
  parallel  = bound + t - `Fitted.parallel_saved_s` a layer
  desync:2  = bound + t a layer
  ladder    = bound + the part of a block's all-reduce that the next block does not
              cover + what the covered part adds to that block (cost of interference)

The all-reduce and the interference are those of the chip's row, as in a plan.
"""

from typing import NamedTuple

from ladder_jax.hardware import chips, cost
from ladder_jax.planner import operations
from ladder_jax.planner.published import NEW_TOKENS, PROMPT, Model, Times

# Published products of the reference: 590 of 989 TFLOP/s.
CHIP = chips.CHIPS["h100"]._replace(product_efficiency=590 / 989)
# Reads and writes of a row of the residual stream's size, for each block of a prefill:
# 2 of the norm, 3 of the residual sum, 1 of everything else.
PASSES = 6


class Fitted(NamedTuple):
    """The numbers that calibrate.py fits to 70B on 8 GPUs, beside four of the chip's
    row: `long_all_reduce`, `interference`, `product_interference`."""

    # Seconds of a block's kernels beside its weights' bytes: at batch 1, where
    # torch.compile fuses a product of one row; and elsewhere, with cuBLAS.
    fused_block_s: float = 12.6e-6
    block_s: float = 23.0e-6
    # Decode: seconds of attention for each row of the batch and 1024 numbers a GPU of
    # the repeated keys of a position.
    row_s: float = 1.95e-6
    # Prefill without a kernel for attention: seconds of a query head for each of the
    # scores of its matrix.
    score_s: float = 11.1e-12
    parallel_saved_s: float = 3.9e-6  # a norm and a sum fewer
    # Prefill without a kernel: the share of the overlap that torch.compile's order of
    # the waits loses.
    lost: float = 0.45


class Setting(NamedTuple):
    """What the model is of."""

    model: Model
    gpus: int  # tensor-parallel, 8 a node
    batch: int
    chip: chips.Chip = CHIP
    fitted: Fitted = Fitted()
    all_reduce: float | None = None  # see cost.Network


class Block(NamedTuple):
    """Seconds of a block, and how an all-reduce beside it slows it."""

    seconds: float
    interference: operations.Interference


def decode_step(setting: Setting) -> Times:
    """Seconds of a decode step."""
    model, gpus, batch = setting.model, setting.gpus, setting.batch
    fitted = setting.fitted
    kernels_s = fitted.fused_block_s if batch == 1 else fitted.block_s
    attention, mlp = (
        _block(setting, shapes, batch, kernels_s) for shapes in _shapes(model, gpus)
    )
    keys = model.dim / gpus / 1024
    attention = attention._replace(
        seconds=attention.seconds + batch * keys * fitted.row_s
    )
    unembedding_s = _hbm_s(setting.chip, model.vocab * model.dim)
    saved_s = setting.fitted.parallel_saved_s
    return _times(setting, attention, mlp, unembedding_s, batch, saved_s)


def prefill(setting: Setting, tokens: int = PROMPT, kernel: bool = True) -> Times:
    """Seconds of a prefill.

    Args:
      setting: see Setting.
      tokens: of each prompt.
      kernel: whether attention is flash attention's kernel, in CUDA graphs; else
        torch.compile's, for a cache with room for the new tokens.
    """
    model, gpus, chip = setting.model, setting.gpus, setting.chip
    rows = setting.batch * tokens
    passes_s = _hbm_s(chip, PASSES * rows * model.dim)
    kernels_s = setting.fitted.block_s + passes_s
    attention, mlp = (
        _block(setting, shapes, rows, kernels_s) for shapes in _shapes(model, gpus)
    )
    # Half of the scores are behind the mask; the products of scores and values.
    products = 2 * setting.batch * tokens**2 * model.dim / gpus
    scores_s = products / (chip.product_efficiency * chip.peak_flops)
    if not kernel:
        scores = setting.batch * tokens * (tokens + NEW_TOKENS) * model.heads / gpus
        scores_s += scores * setting.fitted.score_s
    attention = attention._replace(seconds=attention.seconds + scores_s)
    unembedding_s = _product_s(chip, model.dim, model.vocab, rows)[0]
    unembedding_s += _hbm_s(chip, 2 * rows * model.vocab)
    lost = 0.0 if kernel else setting.fitted.lost
    return _times(setting, attention, mlp, unembedding_s, rows, lost=lost)


def run(setting: Setting) -> Times:
    """Seconds of a published run: a prefill without a kernel, then a step for every
    new token but the first."""
    before, step = prefill(setting, kernel=False), decode_step(setting)
    return Times(*(a + (NEW_TOKENS - 1) * b for a, b in zip(before, step)))


def _shapes(model: Model, gpus: int) -> list[list[tuple[float, float]]]:
    """(inputs, outputs) of the products of attention and of MLP on a GPU."""
    keys = model.kv_heads * model.dim / model.heads
    attention = [
        (model.dim, (model.dim + 2 * keys) / gpus),
        (model.dim / gpus, model.dim),
    ]
    mlp = [(model.dim, 2 * model.ffn / gpus), (model.ffn / gpus, model.dim)]
    return [attention, mlp]


def _block(
    setting: Setting, shapes: list[tuple[float, float]], rows: int, kernels_s: float
) -> Block:
    chip = setting.chip
    times = [_product_s(chip, *shape, rows) for shape in shapes]
    seconds, idle_s = (sum(each) for each in zip(*times))
    weights_s = sum(_hbm_s(chip, wide * deep) for wide, deep in shapes)
    share, once = chip.product_interference, idle_s
    if weights_s >= seconds:
        share, once = chip.interference, 0.0
    return Block(
        max(weights_s, seconds) + kernels_s, operations.Interference(share, once)
    )


def _product_s(
    chip: chips.Chip, depth: float, width: float, rows: int
) -> tuple[float, float]:
    """(seconds, seconds of them with idle cores) of a product of `rows` rows."""
    product = cost.Product(2 * rows * depth * width, round(depth))
    return cost.product_seconds(chip, product)


def _hbm_s(chip: chips.Chip, numbers: float) -> float:
    """Seconds to read or write so many float16 numbers."""
    return 2 * numbers / (chip.hbm_efficiency * chip.hbm_bandwidth)


def _times(
    setting: Setting,
    attention: Block,
    mlp: Block,
    unembedding_s: float,
    rows: int,
    saved_s: float = 0.0,
    lost: float = 0.0,
) -> Times:
    """The step of each schedule.

    saved_s: of each layer of parallel. lost: of ladder's overlap, see `Fitted.lost`.
    """
    model, gpus = setting.model, setting.gpus
    network = cost.Network(
        setting.chip, [gpu // 8 for gpu in range(gpus)], setting.all_reduce
    )
    group, size = list(range(gpus)), 2 * rows * model.dim
    reduction = network.collective("all-reduce", [group], size).seconds
    bound = model.layers * (attention.seconds + mlp.seconds) + unembedding_s
    # Of a layer: its attention's reduction runs during its MLP, and so on.
    added = sum(_added(block, reduction) for block in (attention, mlp))
    ladder = model.layers * (lost * 2 * reduction + (1 - lost) * added)
    return Times(
        standard=bound + 2 * model.layers * reduction,
        ladder=bound + ladder,
        parallel=bound + model.layers * (reduction - saved_s),
        desync=bound + model.layers * reduction,
        bound=bound,
    )


def _added(block: Block, reduction: float) -> float:
    """Seconds that an all-reduce adds to the block beside it."""
    if not reduction:
        return 0.0
    beside = operations.Compute("", "", 1.0, block.seconds, 0.0, block.interference)
    slowed = beside.slowed(reduction)
    return slowed + max(0.0, reduction - block.seconds - slowed)
