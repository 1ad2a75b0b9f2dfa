"""A Llama-family decoder: its math on local shards, without the communication.

A block returns a partial; residual/ reduces it. Between two matrix products a block
calls `progress` on the result of the first: a round of a pending reduction may end
there (overlap.Overlap.progress). `progress` returns its argument.

B batch, T tokens, R positions whose result is read, S cache length, L layers, D model,
N query heads, K key-value heads, H head, F feed-forward, V vocabulary. Inside
`shard_map` N, K, F, V and B are this shard's share: the code takes them from the
arrays' shapes, not from the config.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ladder_jax import beside, config, kv_cache, pages, schedule, sharding
from ladder_jax.attention import Kernel, attend, attend_cache
from ladder_jax.cross_entropy import cross_entropy, sum_over_tokens
from ladder_jax.gated import down, gated
from ladder_jax.matmul import einsum
from ladder_jax.quantised import take_rows
from ladder_jax.residual import layers as residual
from ladder_jax.residual.annealing import Freshness, check_freshness
from ladder_jax.residual.blocks import take
from ladder_jax.residual.dtp import mean_of_streams
from ladder_jax.residual.forms import form_of
from ladder_jax.residual.reductions import Policy
from ladder_jax.residual.sequence import SequenceParallel
from ladder_jax.rotary import rotary, rotate
from ladder_jax.schedule import Block

_save = jax.checkpoint_policies.save_only_these_names
# By train.remat: what the forward pass of a layer saves for the backward pass, which
# computes the rest again.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,  # saves everything
    "dots": _save("product", "reduced"),  # saves matrix products and reduced partials
    "reductions": _save("reduced"),  # saves reduced partials: no reduction runs twice
    "full": _save(),  # saves only the stream at the layer's start
}
Progress = Callable[..., Any]
# By model.activation: the function on the MLP's gate.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), in x's dtype.

    It is computed in float32.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype)


class Context(NamedTuple):
    """What attention needs to know, beside its input."""

    rotation: tuple[jax.Array, jax.Array] | None  # None: no rotary embedding
    segments_BT: jax.Array | None  # the document of each token; None with a cache
    positions_BT: jax.Array  # with a cache: the token's index in it
    kernel: Kernel  # of attention, see attention.kernel_for
    window: int | None  # the tokens that attention sees; None: all
    # If the cache has pages.
    pages_read: pages.Reads | beside.Beside | None = None

    def of(self, block: Block) -> "Context":
        """The context of one block, which may lack the model's rotation or window."""
        return self._replace(
            rotation=self.rotation if block.rope else None,
            window=self.window if block.window else None,
        )


class Attention(nnx.Module):
    """Grouped-query attention with rotary embedding (arXiv 2305.13245)."""

    def __init__(self, model_config: config.Model, rngs: nnx.Rngs) -> None:
        D, H = model_config.dim, model_config.head_dim
        N, K = model_config.heads, model_config.kv_heads
        std = model_config.init_std
        self.eps = model_config.norm_eps
        self.norm = nnx.Param(jnp.ones(D))
        self.wq = _normal(rngs, (D, N, H), std)
        self.wk = _normal(rngs, (D, K, H), std)
        self.wv = _normal(rngs, (D, K, H), std)
        self.wo = _normal(rngs, (N, H, D), _depth_scaled(model_config))
        bias, norm = model_config.qkv_bias, model_config.qk_norm
        self.bq = nnx.Param(jnp.zeros((N, H))) if bias else None
        self.bk = nnx.Param(jnp.zeros((K, H))) if bias else None
        self.bv = nnx.Param(jnp.zeros((K, H))) if bias else None
        self.bo = nnx.Param(jnp.zeros(D)) if model_config.out_bias else None
        self.q_norm = nnx.Param(jnp.ones(H)) if norm else None
        self.k_norm = nnx.Param(jnp.ones(H)) if norm else None

    def __call__(
        self,
        u_BTD: jax.Array,
        context: Context,
        cache: kv_cache.KV | pages.Joint | None,
        progress: Progress,
        read_BR: jax.Array | None,
    ) -> tuple[jax.Array, kv_cache.KV | pages.Joint | None]:
        """This block's partial [B, T, D], and the cache with u's keys and values.

        The partial lacks the output's bias, `bo`. With `read_BR` (only with a cache)
        it has only those positions.
        """
        read_u_BTD = take(u_BTD, read_BR)
        q_BTNH = _project(read_u_BTD, self.wq, self.bq)
        k_BTKH = _project(u_BTD, self.wk, self.bk)
        v_BTKH = _project(u_BTD, self.wv, self.bv)
        q_BTNH, k_BTKH, v_BTKH = progress((q_BTNH, k_BTKH, v_BTKH))
        # A lone row that is computed twice has one row in the cache.
        copies = q_BTNH.shape[0] // context.positions_BT.shape[0]
        if copies > 1:
            q_BTNH, k_BTKH, v_BTKH = (x[:1] for x in (q_BTNH, k_BTKH, v_BTKH))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH = rms_norm(q_BTNH, self.q_norm[...], self.eps)
            k_BTKH = rms_norm(k_BTKH, self.k_norm[...], self.eps)
        if context.rotation is not None:
            cosine, sine = (take(x, read_BR) for x in context.rotation)
            q_BTNH = rotate(q_BTNH, (cosine, sine))
            k_BTKH = rotate(k_BTKH, context.rotation)
        if cache is None:
            segments_BT = context.segments_BT
            assert segments_BT is not None  # required without a cache
            out_BTNH = attend(
                q_BTNH, k_BTKH, v_BTKH, segments_BT, context.kernel, context.window
            )
        elif context.pages_read is None:
            assert isinstance(cache, kv_cache.KV)
            cache = kv_cache.write(cache, k_BTKH, v_BTKH, context.positions_BT)
            positions_BT = take(context.positions_BT, read_BR)
            out_BTNH = attend_cache(q_BTNH, cache, positions_BT, context.window)
        else:
            reads, positions_BT = context.pages_read, context.positions_BT
            cache = beside.write(cache, k_BTKH, v_BTKH, positions_BT, reads)
            positions_BT = take(positions_BT, read_BR)
            out_BTNH = beside.attend(q_BTNH, cache, reads, positions_BT, context.window)
        if copies > 1:
            out_BTNH = jnp.concatenate([out_BTNH] * copies)
        out_BTNH = progress(out_BTNH)
        # E = N H, one dimension: for a product over two, XLA:CPU transposes `wo`.
        out_BTE = out_BTNH.reshape(*out_BTNH.shape[:2], -1)
        wo_ED = self.wo[...].reshape(-1, u_BTD.shape[2])
        return einsum("bte,ed->btd", out_BTE, wo_ED), cache


def _project(
    u_BTD: jax.Array, weight_DNH: nnx.Param, bias_NH: nnx.Param | None
) -> jax.Array:
    return _add_bias(einsum("btd,dnh->btnh", u_BTD, weight_DNH[...]), bias_NH)


def _add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return x if bias is None else x + bias[...].astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU, or GEGLU with the activation gelu (arXiv 2002.05202)."""

    def __init__(
        self, model_config: config.Model, rngs: nnx.Rngs, norm: bool = True
    ) -> None:
        D, F, std = model_config.dim, model_config.ffn_dim, model_config.init_std
        self.activation = model_config.activation
        self.norm = nnx.Param(jnp.ones(D)) if norm else None
        self.gate = _normal(rngs, (D, F), std)
        self.up = _normal(rngs, (D, F), std)
        self.down = _normal(rngs, (F, D), _depth_scaled(model_config))
        bias = model_config.mlp_bias
        self.gate_bias = nnx.Param(jnp.zeros(F)) if bias else None
        self.up_bias = nnx.Param(jnp.zeros(F)) if bias else None
        self.down_bias = nnx.Param(jnp.zeros(D)) if bias else None

    def __call__(self, u_BTD: jax.Array, progress: Progress) -> jax.Array:
        """This block's partial [B, T, D], without the output's bias `down_bias`."""
        gate_BTF = progress(einsum("btd,df->btf", u_BTD, self.gate[...]))
        gate_BTF = _add_bias(gate_BTF, self.gate_bias)
        up_BTF = einsum("btd,df->btf", u_BTD, self.up[...])
        up_BTF = checkpoint_name(up_BTF, "product")
        up_BTF = _add_bias(up_BTF, self.up_bias)
        activation = ACTIVATIONS[self.activation]
        gated_BTF = gated(activation, gate_BTF, up_BTF)
        # The backward pass computes it again.
        gated_BTF = progress(gated_BTF, saved=False)
        return down(activation, gate_BTF, up_BTF, gated_BTF, self.down[...])


class Layer(nnx.Module):
    """Attention and MLP, each with its norm; in schedule parallel they share one."""

    def __init__(self, model_config: config.Model, rngs: nnx.Rngs) -> None:
        residual_schedule = schedule.parse(model_config.residual, model_config.layers)
        is_parallel = len(residual_schedule.layers[0]) == 1
        self.attention = Attention(model_config, rngs)
        self.mlp = MLP(model_config, rngs, norm=not is_parallel)


class Transformer(nnx.Module):
    """The decoder's parameters, float32.

    `layers` is one Layer whose arrays lead with a layer dimension.
    """

    def __init__(self, model_config: config.Model, rngs: nnx.Rngs) -> None:
        V, D, std = model_config.vocab_size, model_config.dim, model_config.init_std
        self.embedding = _normal(rngs, (V, D), std)
        keys = jax.random.split(rngs(), model_config.layers)
        self.layers = jax.vmap(lambda key: Layer(model_config, nnx.Rngs(key)))(keys)
        self.norm = nnx.Param(jnp.ones(D))
        tied = model_config.tie_embeddings
        self.unembedding = None if tied else _normal(rngs, (D, V), std)


class Unstacked(NamedTuple):
    """A Transformer whose layers are a list.

    With a stack of layers, compiled decoding would copy every layer's slice.
    """

    embedding: nnx.Param
    layers: list[Layer]
    norm: nnx.Param
    unembedding: nnx.Param | None


def unstack(model: Transformer) -> Unstacked:
    """`model` as an `Unstacked`: every layer has its own arrays."""
    count = model.layers.attention.norm.shape[0]
    layers = [jax.tree.map(lambda x, i=i: x[i], model.layers) for i in range(count)]
    return Unstacked(model.embedding, layers, model.norm, model.unembedding)


def init(model_config: config.Model, key: jax.Array) -> Transformer:
    """A Transformer with fresh parameters."""
    return Transformer(model_config, nnx.Rngs(key))


def abstract(model_config: config.Model) -> Transformer:
    """The shapes and dtypes of a Transformer's parameters; nothing is allocated."""
    return jax.eval_shape(lambda: init(model_config, jax.random.key(0)))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs(), shape))


def _depth_scaled(model_config: config.Model) -> float:
    """A standard deviation with which depth does not change the stream's variance."""
    return model_config.init_std * (2 * model_config.layers) ** -0.5


# The forward pass and the loss, inside `shard_map`.


def hidden(
    model: Transformer | Unstacked,
    model_config: config.Model,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    cache: Any = None,
    read_BR: jax.Array | None = None,
    *,
    pages_read: pages.Reads | beside.Beside | None = None,
    kernel: Kernel = "xla",
    reduction: str | Policy = "psum",
    remat: str = "none",
    unroll: bool = False,
    freshness: Freshness | None = None,
    sequence_parallel: bool = False,
    twice: bool = False,
) -> tuple[jax.Array, Any]:
    """The final residual stream, and the cache with these tokens written.

    Args:
      model: the parameters' shards.
      model_config: the model's shape and residual schedule.
      tokens_BT: token ids.
      positions_BT: without a cache, each token's position in its document; with a
        cache, its index in the cache.
      segments_BT: without a cache, the number of each token's document, as a row may
        hold several documents.
      cache: None for whole sequences. For generation a kv_cache.KV [L, B, K, S, H] of
        past keys and values; if `model.layers` is a list, a list of KV [B, K, S, H].
        With `pages_read` it is the kv of a pages.Pool.
      read_BR: with a cache, the positions along T at which the caller reads the result;
        None for all. The last layers then compute little more than keys and values for
        the other positions (residual/layers.run).
      pages_read: the pages that attention reads.
      kernel: see attention.kernel_for.
      reduction: a name in reductions.REDUCTIONS, or a Policy (choose.reduction_for).
      remat: a name in REMAT.
      unroll: whether the compiled program repeats the layer scan's body.
      freshness: None, or a scalar from 0 to 1 for an annealed delay: how much of the
        newest terms a delayed block reads (residual/annealing.py). With an array every
        block has its own: 1 makes it standard, 0 what its schedule says.
      sequence_parallel: whether each tensor shard has the stream of its own tokens
        alone (residual/sequence.py). It changes no result.
      twice: with a cache and delays, whether a lone token's row is computed twice, side
        by side, but for attention itself. It changes no result (chips.Chip.doubles_row)
        and takes less time than to double the row of each product (matmul.product).

    Returns:
      The stream [B, T or R, D], in the compute dtype, and the cache, in its own form.
      With dtp it is this tensor shard's own stream; `logits` takes the mean.
    """
    if freshness is not None:
        check_freshness(model_config, freshness)
    residual_schedule = model_config.residual_schedule()
    twice = twice and cache is not None and read_BR is None and tokens_BT.size == 1
    if twice := twice and residual_schedule.overlaps:
        tokens_BT = jnp.concatenate([tokens_BT, tokens_BT])
    rotation, window = (
        _rotation(model_config, positions_BT),
        model_config.sliding_window,
    )
    context = Context(rotation, segments_BT, positions_BT, kernel, window, pages_read)
    sequence = None
    if sequence_parallel and sharding.axis_size(sharding.TENSOR) > 1:
        norm = partial(rms_norm, eps=model_config.norm_eps)
        sequence = SequenceParallel(_norm_scale, norm, tokens_BT.shape[1])
    x_BTD, outputs = residual.run(
        residual_schedule,
        embed(model, jnp.dtype(model_config.dtype), tokens_BT),
        _with_caches(model.layers, cache),
        partial(compute_block, model_config, context, is_normed=sequence is not None),
        form_of(residual_schedule, reduction, freshness, sequence),
        remat=REMAT[remat],
        unroll=unroll,
        read_BR=read_BR,
    )
    return x_BTD[:1] if twice else x_BTD, _caches_of(outputs)


def _with_caches(layers: Any, cache: Any) -> Any:
    """Layers with their caches, as residual.run takes them."""
    if isinstance(layers, list):
        return list(zip(layers, cache or [None] * len(layers)))
    return layers, cache


def _caches_of(outputs: Any) -> Any:
    """The caches: each layer's first block is the one with attention."""
    if isinstance(outputs, list):
        return [blocks[0] for blocks in outputs]
    return outputs[0]


def _rotation(model_config: config.Model, positions_BT: jax.Array) -> Any:
    """The cosines and sines of these positions."""
    rotation = rotary(
        positions_BT,
        model_config.head_dim,
        model_config.rope_theta,
        model_config.rope_scaling,
    )
    # Without the barrier XLA:CPU computes the sines again for every head.
    return lax.optimization_barrier(rotation)


def compute_block(
    model_config: config.Model,
    context: Context,
    layer_and_cache: tuple[Layer, Any],
    block: Block,
    x_BTD: jax.Array,
    progress: Progress,
    read_BR: jax.Array | None,
    is_normed: bool = False,
) -> tuple[jax.Array, Any]:
    """A block's partial [B, T or R, D], and its cache; see residual/layers.run.

    The layer's parameters are shards. This gathers those of the block's parts.
    `is_normed`: whether `x_BTD` has gone through the block's norm.
    """
    layer, cache = layer_and_cache
    dtype = jnp.dtype(model_config.dtype)
    # "attention" and "mlp" -> the module with gathered parameters
    parts = {
        name: sharding.gather_parameters(getattr(layer, name), dtype, name)
        for name in block.parts
    }
    u_BTD = x_BTD
    if not is_normed:
        scale_D = parts[block.parts[0]].norm[...]
        u_BTD = rms_norm(x_BTD, scale_D, model_config.norm_eps)
    partials_BTD, new_cache = [], None
    if "attention" in parts:
        attention = parts["attention"]
        partial_BTD, new_cache = attention(
            u_BTD, context.of(block), cache, progress, read_BR
        )
        partials_BTD.append(_add_output_bias(partial_BTD, attention.bo, block))
    if "mlp" in parts:
        mlp = parts["mlp"]
        partial_BTD = mlp(take(u_BTD, read_BR), progress)
        partials_BTD.append(_add_output_bias(partial_BTD, mlp.down_bias, block))
    return sum(partials_BTD[1:], partials_BTD[0]), new_cache


def _norm_scale(layer_and_cache: tuple[Layer, Any], block: Block) -> jax.Array:
    """The scale [D] of a block's norm, or of a stack of layers [L, D]."""
    layer, _ = layer_and_cache
    return getattr(layer, block.parts[0]).norm[...]


def _add_output_bias(
    partial_BTD: jax.Array, bias_D: nnx.Param | None, block: Block
) -> jax.Array:
    """A block's partial with its output's bias, which joins every stream once.

    If the block reduces, the shards' partials are added up, so one shard adds the bias.
    Otherwise each shard adds its own partial to its own stream, and the bias with it.
    """
    if bias_D is None:
        return partial_BTD
    bias = bias_D[...].astype(partial_BTD.dtype)
    return partial_BTD + (sharding.on_first_shard(bias) if block.reduce else bias)


def embed(
    model: Transformer | Unstacked, dtype: jnp.dtype, tokens_BT: jax.Array
) -> jax.Array:
    """The embedding's partial [B, T, D]: zeros where another shard has the token."""
    table_VD = sharding.gather_parameters(model.embedding, dtype, "embedding")[...]
    rows_BT = tokens_BT - sharding.vocabulary_offset(table_VD.shape[0])
    is_local_BT = (rows_BT >= 0) & (rows_BT < table_VD.shape[0])
    x_BTD = take_rows(table_VD, jnp.where(is_local_BT, rows_BT, 0))
    return jnp.where(is_local_BT[..., None], x_BTD, 0).astype(dtype)


def logits(
    model: Transformer | Unstacked, model_config: config.Model, x_BTD: jax.Array
) -> jax.Array:
    """This tensor shard's logits [B, T, V], float32, from the final residual stream."""
    u_BTD = rms_norm(x_BTD, model.norm[...], model_config.norm_eps)
    if schedule.parse(model_config.residual, model_config.layers).mean:
        with jax.named_scope("last"):
            u_BTD = mean_of_streams(u_BTD)
    dtype = u_BTD.dtype
    if model.unembedding is None:
        table_VD = sharding.gather_parameters(model.embedding, dtype, "embedding")[...]
        return einsum("btd,vd->btv", u_BTD, table_VD, jnp.float32)
    table_DV = sharding.gather_parameters(model.unembedding, dtype, "unembedding")[...]
    return einsum("btd,dv->btv", u_BTD, table_DV, jnp.float32)


def loss(
    model: Transformer | Unstacked,
    model_config: config.Model,
    batch: Mapping[str, jax.Array],
    *,
    chunk: int = 0,
    **options: Any,
) -> jax.Array:
    """The weighted sum of this data shard's cross-entropies, nats.

    Args:
      model: the parameters' shards.
      model_config: the model's shape and residual schedule.
      batch: tokens, targets, segments, positions, weights, each [B, T] (data/corpus).
      chunk: if not 0, logits are computed for this many tokens at a time, and again
        in the backward pass.
      options: of `hidden`: kernel, reduction, remat, unroll, freshness.

    Returns:
      A scalar, the same on all tensor shards.
    """
    tokens_BT, positions_BT = batch["tokens"], batch["positions"]
    x_BTD, _ = hidden(
        model, model_config, tokens_BT, positions_BT, batch["segments"], **options
    )

    def weighted_sum(
        x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
    ) -> jax.Array:
        logits_BTV = logits(model, model_config, x_BTD)
        return jnp.sum(cross_entropy(logits_BTV, targets_BT) * weights_BT)

    arrays = x_BTD, batch["targets"], batch["weights"]
    return sum_over_tokens(weighted_sum, arrays, chunk)
