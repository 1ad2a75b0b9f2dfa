"""A Llama-family decoder: the math on local shards. What flows between the blocks is residual.py's concern.

B batch, T tokens, S cache length, L layers, D model, N query heads, K key-value heads, H head, F feed-forward,
V vocabulary. Inside `shard_map` N, K, F, V and B are this shard's share; shapes are read off the arrays.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ladder_jax import attention as attention_door
from ladder_jax import kv_cache, schedule, sharding
from ladder_jax.matmul import einsum
from ladder_jax.residual import layers as residual
from ladder_jax.residual.reductions import reduce

_save = jax.checkpoint_policies.save_only_these_names
REMAT = {  # what the backward pass does not recompute of a layer
    "none": None,  # everything is kept
    "dots": _save(
        "product", "reduced"
    ),  # the blocks' matrix products and the reductions' sums
    "reductions": _save("reduced"),  # no communication is repeated
    "full": _save(),  # the stream at the layer's start alone
}


def rms_norm(x, scale, eps):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), computed in float32, in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype)


class Context(NamedTuple):
    """What all layers share in one forward pass."""

    rotation: tuple[jax.Array, jax.Array]
    segments_BT: jax.Array | None  # of a whole sequence, or
    positions_BT: jax.Array  # with a cache: where in it each token stands
    kernel: str  # of attention, see attention.kernel_for


def _alone(product, *operands, name=None):
    """In the place of residual.Stream.behind, where nothing is to run behind a product."""
    return product(*operands)


class Attention(nnx.Module):
    """Grouped-query attention with rotary embedding (arXiv 2305.13245)."""

    def __init__(self, config, rngs):
        D, N, K, H = config.dim, config.heads, config.kv_heads, config.head_dim
        self.eps = config.norm_eps
        self.norm = nnx.Param(jnp.ones(D))
        self.wq = _normal(rngs, (D, N, H), config.init_std)
        self.wk = _normal(rngs, (D, K, H), config.init_std)
        self.wv = _normal(rngs, (D, K, H), config.init_std)
        self.wo = _normal(rngs, (N, H, D), _depth_scaled(config))
        self.bq, self.bk, self.bv = (
            nnx.Param(jnp.zeros((heads, H))) if config.qkv_bias else None
            for heads in (N, K, K)
        )
        self.q_norm, self.k_norm = (
            nnx.Param(jnp.ones(H)) if config.qk_norm else None for _ in range(2)
        )

    def __call__(self, u_BTD, context, cache=None, behind=_alone, read_BR=None):
        """The partial [B, T, D] of this block, and the cache with this call's keys and values written. With `read_BR`,
        which takes a cache, the partial is of those positions along T alone (see residual.take).

        Matrix products are called through `behind`, so that communication can run behind them (see residual.py): three
        times here as in MLP, behind much the same work each time.
        """
        asked = lambda x_BT: residual.take(x_BT, read_BR)
        q_BTNH, k_BTKH, v_BTKH = behind(
            lambda u_BTD: (
                self._project(asked(u_BTD), self.wq, self.bq),
                self._project(u_BTD, self.wk, self.bk),
                self._project(u_BTD, self.wv, self.bv),
            ),
            u_BTD,
        )
        if self.q_norm is not None:
            q_BTNH = rms_norm(q_BTNH, self.q_norm[...], self.eps)
            k_BTKH = rms_norm(k_BTKH, self.k_norm[...], self.eps)
        q_BTNH = attention_door.rotate(q_BTNH, map(asked, context.rotation))
        k_BTKH = attention_door.rotate(k_BTKH, context.rotation)
        if cache is None:
            attend = lambda *qkv: attention_door.attend(
                *qkv, context.segments_BT, context.kernel
            )
            out_BTNH = behind(attend, q_BTNH, k_BTKH, v_BTKH)
        else:
            cache = kv_cache.write(cache, k_BTKH, v_BTKH, context.positions_BT)
            positions_BT = asked(context.positions_BT)
            out_BTNH = behind(
                lambda q_BTNH: attention_door.attend_cache(q_BTNH, cache, positions_BT),
                q_BTNH,
            )
        out_BTE = out_BTNH.reshape(
            *out_BTNH.shape[:2], -1
        )  # E = N H: as one, or XLA:CPU turns `wo` around
        wo_ED = self.wo[...].reshape(-1, u_BTD.shape[2])
        return behind(
            lambda out_BTE: einsum("bte,ed->btd", out_BTE, wo_ED), out_BTE
        ), cache

    def _project(self, u_BTD, weight, bias):
        x_BTNH = einsum("btd,dnh->btnh", u_BTD, weight[...])
        return x_BTNH if bias is None else x_BTNH + bias[...].astype(x_BTNH.dtype)


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config, rngs, norm=True):
        D, F = config.dim, config.ffn_dim
        self.norm = nnx.Param(jnp.ones(D)) if norm else None
        self.gate = _normal(rngs, (D, F), config.init_std)
        self.up = _normal(rngs, (D, F), config.init_std)
        self.down = _normal(rngs, (F, D), _depth_scaled(config))

    def __call__(self, u_BTD, behind=_alone):
        """The partial [B, T, D] of this block; `behind` as in Attention."""
        gate_BTF = behind(
            lambda u_BTD: einsum("btd,df->btf", u_BTD, self.gate[...]), u_BTD
        )

        def activate(u_BTD):
            up_BTF = checkpoint_name(
                einsum("btd,df->btf", u_BTD, self.up[...]), "product"
            )
            return (jax.nn.silu(gate_BTF.astype(jnp.float32)) * up_BTF).astype(
                u_BTD.dtype
            )  # rounded once

        gated_BTF = behind(
            activate, u_BTD, name="activation"
        )  # which remat computes again from the two products
        return behind(
            lambda gated_BTF: einsum("btf,fd->btd", gated_BTF, self.down[...]),
            gated_BTF,
        )


class Layer(nnx.Module):
    """Attention and MLP, each with its norm, or with one norm for both (parallel)."""

    def __init__(self, config, rngs):
        shared = len(schedule.parse(config.residual, config.layers).layers[0]) == 1
        self.attention = Attention(config, rngs)
        self.mlp = MLP(config, rngs, norm=not shared)


class Transformer(nnx.Module):
    """The decoder's parameters, float32. `layers` is one Layer whose arrays lead with a layer dimension."""

    def __init__(self, config, rngs):
        V, D = config.vocab_size, config.dim
        self.embedding = _normal(rngs, (V, D), config.init_std)
        self.layers = jax.vmap(lambda key: Layer(config, nnx.Rngs(key)))(
            jax.random.split(rngs(), config.layers)
        )
        self.norm = nnx.Param(jnp.ones(D))
        self.unembedding = (
            None if config.tie_embeddings else _normal(rngs, (D, V), config.init_std)
        )


class Unstacked(NamedTuple):
    """A Transformer whose layers are a list, so that compiled decoding copies no slices of a stack."""

    embedding: nnx.Param
    layers: list[Layer]
    norm: nnx.Param
    unembedding: nnx.Param | None


def unstack(model):
    """`model` (a Transformer) as an `Unstacked`, with arrays of its own for every layer."""
    count = model.layers.attention.norm.shape[0]
    layers = [jax.tree.map(lambda x, i=i: x[i], model.layers) for i in range(count)]
    return Unstacked(model.embedding, layers, model.norm, model.unembedding)


def init(config, key):
    """A Transformer with fresh parameters. Under `jax.eval_shape` or `jax.jit`, of any size."""
    return Transformer(config, nnx.Rngs(key))


def abstract(config):
    """The shapes and dtypes of a Transformer's parameters; nothing is allocated."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def _normal(rngs, shape, std):
    return nnx.Param(std * jax.random.normal(rngs(), shape))


def _depth_scaled(config):
    return (
        config.init_std * (2 * config.layers) ** -0.5
    )  # so that the stream's variance does not grow with depth


# The forward pass and the loss, inside `shard_map`.


def hidden(
    model,
    config,
    tokens_BT,
    positions_BT,
    segments_BT=None,
    cache=None,
    read_BR=None,
    *,
    kernel="xla",
    reduction="psum",
    remat="none",
    unroll=False,
):
    """The final residual stream [B, T, D], and the cache with these tokens written.

    Whole sequences: `segments_BT` numbers the documents packed into a row, `positions_BT` restarts in each. Generation:
    `cache` is a cache.KV [L, B, K, S, H] of past keys and values, `positions_BT` says where in it the tokens stand.
    Where `model.layers` is a list of layers (see `unstack`), `cache` is one of KVs [B, K, S, H], and so is the result.
    With a cache, `read_BR` names the positions along T whose stream [B, R, D] is wanted, where not all are: of the last
    layer hardly more than keys and values is computed for the others (see residual.run).
    """
    dtype = jnp.dtype(config.dtype)
    rotation = (
        lax.optimization_barrier(  # or XLA:CPU computes sines again for every head
            attention_door.rotary(
                positions_BT, config.head_dim, config.rope_theta, config.rope_scaling
            )
        )
    )
    context = Context(rotation, segments_BT, positions_BT, kernel)

    def apply(layer_and_cache, block, x_BTD, behind, read_BR):
        layer, cache = layer_and_cache
        parts = {
            name: sharding.gather_parameters(getattr(layer, name), dtype, name)
            for name in block.parts
        }
        u_BTD = rms_norm(x_BTD, parts[block.parts[0]].norm[...], config.norm_eps)
        partials_BTD, new_cache = [], None
        if "attention" in parts:
            partial_BTD, new_cache = parts["attention"](
                u_BTD, context, cache, behind, read_BR
            )
            partials_BTD.append(partial_BTD)
        if "mlp" in parts:
            partials_BTD.append(parts["mlp"](residual.take(u_BTD, read_BR), behind))
        return sum(partials_BTD[1:], partials_BTD[0]), new_cache

    embedded_BTD = embed(model, dtype, tokens_BT)
    plan = schedule.parse(config.residual, config.layers)
    unstacked = isinstance(model.layers, list)
    layers = (
        list(zip(model.layers, cache or [None] * len(model.layers)))
        if unstacked
        else (model.layers, cache)
    )
    x_BTD, outputs = residual.run(
        plan,
        embedded_BTD,
        layers,
        apply,
        reduction=reduction,
        remat=REMAT[remat],
        unroll=unroll,
        read_BR=read_BR,
    )
    # a layer's first block is the one with attention
    return x_BTD, [blocks[0] for blocks in outputs] if unstacked else outputs[0]


def embed(model, dtype, tokens_BT):
    """The embedding's partial [B, T, D]: rows of the tokens that this tensor shard holds, zeros for the others."""
    table_VD = sharding.gather_parameters(model.embedding, dtype, "embedding")[...]
    rows_BT = tokens_BT - sharding.vocabulary_offset(table_VD.shape[0])
    held_BT = (rows_BT >= 0) & (rows_BT < table_VD.shape[0])
    return jnp.where(
        held_BT[..., None], table_VD[jnp.where(held_BT, rows_BT, 0)], 0
    ).astype(dtype)


def logits(model, config, x_BTD):
    """This tensor shard's logits [B, T, V], float32, from the final residual stream."""
    u_BTD = rms_norm(x_BTD, model.norm[...], config.norm_eps)
    if model.unembedding is None:
        table_VD = sharding.gather_parameters(
            model.embedding, u_BTD.dtype, "embedding"
        )[...]
        return einsum("btd,vd->btv", u_BTD, table_VD, jnp.float32)
    table_DV = sharding.gather_parameters(
        model.unembedding, u_BTD.dtype, "unembedding"
    )[...]
    return einsum("btd,dv->btv", u_BTD, table_DV, jnp.float32)


def cross_entropy(logits_BTV, targets_BT):
    """-log p(target) of every token [B, T], nats, from vocabulary shards; the full logits are never gathered."""
    top_BT = sharding.largest(logits_BTV.max(axis=-1))
    rows_BT = targets_BT - sharding.vocabulary_offset(logits_BTV.shape[-1])
    total_BT, target_BT = _softmax_terms(logits_BTV, top_BT, rows_BT)
    return jnp.log(reduce(total_BT)) + top_BT - reduce(target_BT)


@jax.custom_vjp
def _softmax_terms(logits_BTV, top_BT, rows_BT):
    """The sum of exp(logit - top), and the logit of row `rows_BT`, 0 where another shard has it: [B, T] each.

    The backward pass computes the exponentials again: the logits are kept, and nothing else of their size.
    """
    total_BT = jnp.exp(logits_BTV - top_BT[..., None]).sum(axis=-1)
    V = logits_BTV.shape[-1]
    held_BT = (rows_BT >= 0) & (rows_BT < V)
    target_BT = jnp.take_along_axis(
        logits_BTV, jnp.where(held_BT, rows_BT, 0)[..., None], axis=-1
    )[..., 0]
    return total_BT, jnp.where(held_BT, target_BT, 0)


def _softmax_terms_backward(kept, cotangents):
    logits_BTV, top_BT, rows_BT = kept
    dtotal_BT1, dtarget_BT1 = (cotangent[..., None] for cotangent in cotangents)
    chosen_BTV = rows_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    return (
        dtotal_BT1 * jnp.exp(logits_BTV - top_BT[..., None])
        + jnp.where(chosen_BTV, dtarget_BT1, 0),
        None,
        None,
    )


_softmax_terms.defvjp(
    lambda *arguments: (_softmax_terms(*arguments), arguments), _softmax_terms_backward
)


def loss(
    model,
    config,
    batch,
    *,
    kernel="xla",
    reduction="psum",
    remat="none",
    unroll=False,
    chunk=0,
):
    """The weighted sum of this data shard's cross-entropies, nats: a scalar that all its tensor shards share.

    `batch`: tokens, targets, segments, positions, weights, each [B, T] (see data.py). With `chunk`, the logits of that
    many tokens exist at a time, and are computed again in the backward pass.
    """
    x_BTD, _ = hidden(
        model,
        config,
        batch["tokens"],
        batch["positions"],
        batch["segments"],
        kernel=kernel,
        reduction=reduction,
        remat=remat,
        unroll=unroll,
    )

    def part(x_BTD, targets_BT, weights_BT):
        return jnp.sum(
            cross_entropy(logits(model, config, x_BTD), targets_BT) * weights_BT
        )

    if not chunk:
        return part(x_BTD, batch["targets"], batch["weights"])
    flat = [
        x.reshape(-1, *x.shape[2:]) for x in (x_BTD, batch["targets"], batch["weights"])
    ]
    chunk = min(chunk, flat[0].shape[0])
    pad = -flat[0].shape[0] % chunk
    flat = [
        jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(
            -1, 1, chunk, *x.shape[1:]
        )
        for x in flat
    ]
    return jax.lax.scan(
        lambda total, xs: (total + jax.checkpoint(part)(*xs), None),
        jnp.float32(0),
        tuple(flat),
    )[0]
