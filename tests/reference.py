"""The models as their papers write them, on one device, with loops and no sharding.

It is written from the equations (Ladder Residual, arXiv 2501.06589: eq. 1, eq. 2;
GPT-J/PaLM parallel blocks; desync residual with the mean rule; delayed tensor
parallelism of Kog's article), not from ladder_jax: only the parameter tree is shared.
"""

import jax
import jax.numpy as jnp


def norm(x, scale, eps):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rope(x_TNH, positions_T, config):
    half = config.head_dim // 2
    frequency = 1.0 / config.rope_theta ** (jnp.arange(half) / half)
    if config.rope_scaling.factor != 1:  # Llama 3.1: three bands of wavelengths
        s = config.rope_scaling
        wavelength = 2 * jnp.pi / frequency
        smooth = (s.original_length / wavelength - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        middle = (1 - smooth) * frequency / s.factor + smooth * frequency
        frequency = jnp.where(
            wavelength > s.original_length / s.low_freq_factor,
            frequency / s.factor,
            jnp.where(
                wavelength < s.original_length / s.high_freq_factor, frequency, middle
            ),
        )
    angle = positions_T[:, None] * frequency
    cosine, sine = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    first, second = x_TNH[..., :half], x_TNH[..., half:]
    return jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )


def share(size, ranks, rank):
    """1 for the heads or units, of `size`, that a rank holds; 0 for the others."""
    return jnp.float32(jnp.arange(size) * ranks // size == rank)


def attention(p, u_TD, positions_T, segments_T, config, ranks=1, rank=0):
    """One rank's partial output: only its own heads reach the output projection."""
    N, K = config.heads, config.kv_heads
    q = jnp.einsum("td,dnh->tnh", u_TD, p.wq[...])
    k = jnp.einsum("td,dnh->tnh", u_TD, p.wk[...])
    v = jnp.einsum("td,dnh->tnh", u_TD, p.wv[...])
    if p.bq is not None:
        q, k, v = q + p.bq[...], k + p.bk[...], v + p.bv[...]
    if p.q_norm is not None:
        q, k = (
            norm(q, p.q_norm[...], config.norm_eps),
            norm(k, p.k_norm[...], config.norm_eps),
        )
    q, k = rope(q, positions_T, config), rope(k, positions_T, config)
    # Every query head gets a copy of its own.
    k, v = (jnp.repeat(x, N // K, axis=1) for x in (k, v))
    T = len(q)
    allowed = jnp.tril(jnp.ones((T, T), bool)) & (
        segments_T[:, None] == segments_T[None]
    )
    scores = jnp.einsum("tnh,snh->nts", q, k) / jnp.sqrt(config.head_dim)
    weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30))
    heads = jnp.einsum("nts,snh->tnh", weights, v) * share(N, ranks, rank)[:, None]
    return jnp.einsum("tnh,nhd->td", heads, p.wo[...])


def mlp(p, u_TD, config, ranks=1, rank=0):
    units = jax.nn.silu(u_TD @ p.gate[...]) * (u_TD @ p.up[...])
    return (units * share(config.ffn_dim, ranks, rank)) @ p.down[...]


def stream(model, config, tokens_T, positions_T, segments_T, ranks=1, freshness=0.0):
    """The final residual stream [T, D]; with dtp, every rank's.

    `ranks` matters to desync and dtp alone, and `freshness` to ladder and delays: a
    block reads that share of the stream of standard, and the rest of the stale stream.
    """
    x = model.embedding[...][tokens_T]
    eps = config.norm_eps
    layers = [
        jax.tree.map(lambda w, i=i: w[i], model.layers) for i in range(config.layers)
    ]
    attend = lambda p, u, **rank: attention(
        p, u, positions_T, segments_T, config, **rank
    )
    kind, _, argument = config.residual.partition(":")

    if kind == "standard":
        for layer in layers:
            x = x + attend(layer.attention, norm(x, layer.attention.norm[...], eps))
            x = x + mlp(layer.mlp, norm(x, layer.mlp.norm[...], eps), config)
        return x

    if kind == "parallel":
        for layer in layers:
            u = norm(x, layer.attention.norm[...], eps)
            x = x + attend(layer.attention, u) + mlp(layer.mlp, u, config)
        return x

    if kind == "hybrid":
        # The two accumulated streams of the published conversion code.
        attention_stream = mlp_stream = x
        for i, layer in enumerate(layers):
            if i in parse_layers(argument, config.layers):
                previous = mlp_stream
                attention_stream = previous + attend(
                    layer.attention,
                    norm(attention_stream, layer.attention.norm[...], eps),
                )
                mlp_stream = attention_stream + mlp(
                    layer.mlp, norm(previous, layer.mlp.norm[...], eps), config
                )
            else:
                attention_stream = mlp_stream + attend(
                    layer.attention, norm(mlp_stream, layer.attention.norm[...], eps)
                )
                mlp_stream = attention_stream + mlp(
                    layer.mlp, norm(attention_stream, layer.mlp.norm[...], eps), config
                )
        return mlp_stream

    if kind in ("ladder", "delays"):  # x_i = h_i(x_{i-1-delay_i}) + x_{i-1}
        delays = [int(d) for d in argument.split(",")] if argument else [1, 1]
        delays = delays * (config.layers if len(delays) == 2 else 1)
        history = [x]  # the stream after 0, 1, 2, ... blocks
        for i, layer in enumerate(layers):
            for part, block in (("attention", 2 * i), ("mlp", 2 * i + 1)):
                delay = (
                    delays[block]
                    if kind == "delays" or block
                    else min(delays[block], block)
                )
                if kind == "ladder" and block:  # a delay rises by at most one a block
                    delay = delays[block] = min(delays[block], delays[block - 1] + 1)
                stale = history[max(block - delay, 0)]
                seen = freshness * history[-1] + (1 - freshness) * stale
                module = getattr(layer, part)
                u = norm(seen, module.norm[...], eps)
                history.append(
                    history[-1]
                    + (
                        attend(module, u)
                        if part == "attention"
                        else mlp(module, u, config)
                    )
                )
        return history[-1]

    if kind == "desync":
        every, blocks = int(argument), 2 * config.layers
        copies = [x] * ranks
        for i, layer in enumerate(layers):
            for part, block in (("attention", 2 * i), ("mlp", 2 * i + 1)):
                module = getattr(layer, part)
                outputs = []
                for rank in range(ranks):
                    u = norm(copies[rank], module.norm[...], eps)
                    own = dict(ranks=ranks, rank=rank)
                    outputs.append(
                        attend(module, u, **own)
                        if part == "attention"
                        else mlp(module, u, config, **own)
                    )
                if (block + 1) % every == 0 or block == blocks - 1:
                    total = sum(outputs) + sum(copies) / ranks
                    copies = [total] * ranks
                else:
                    copies = [copy + output for copy, output in zip(copies, outputs)]
        return copies[0]
    if kind == "dtp":
        return dtp_streams(attend, config, layers, x, int(argument), ranks)
    raise AssertionError(config.residual)


def dtp_streams(attend, config, layers, x, d, ranks):
    """Every rank's final stream [ranks, T, D], from the equations in residual/dtp.py.

    `outputs[n][l]` is o_l^n.
    """
    streams, outputs = [x] * ranks, []
    blocks = [(layer, part) for layer in layers for part in ("attention", "mlp")]
    for n, (layer, part) in enumerate(blocks):
        module, own = getattr(layer, part), []
        for rank in range(ranks):
            u = norm(streams[rank], module.norm[...], config.norm_eps)
            which = dict(ranks=ranks, rank=rank)
            own.append(
                attend(module, u, **which)
                if part == "attention"
                else mlp(module, u, config, **which)
            )
        outputs.append(own)
        for rank in range(ranks):
            if n < d:
                streams[rank] = streams[rank] + jnp.sqrt(ranks) * own[rank]
            else:
                streams[rank] = streams[rank] + own[rank]
                for other in set(range(ranks)) - {rank}:
                    streams[rank] = streams[rank] + outputs[n - d][other]
    return jnp.stack(streams)


def parse_layers(text, count):
    if text.startswith("last"):
        return range(count - int(text[4:]), count)
    layers_of_list = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        layers_of_list += range(int(first), int(last or first) + 1)
    return layers_of_list


def logits(model, config, tokens_T, positions_T, segments_T, ranks=1, freshness=0.0):
    x = norm(
        stream(model, config, tokens_T, positions_T, segments_T, ranks, freshness),
        model.norm[...],
        config.norm_eps,
    )
    if config.residual.startswith("dtp"):
        x = x.mean(axis=0)  # of the ranks
    return x @ (
        model.embedding[...].T if model.unembedding is None else model.unembedding[...]
    )


def loss(model, config, batch, ranks=1, freshness=0.0):
    """The weighted mean cross-entropy of a batch of packed rows, nats a token."""

    def row(tokens_T, positions_T, segments_T, targets_T, weights_T):
        logp_TV = jax.nn.log_softmax(
            logits(model, config, tokens_T, positions_T, segments_T, ranks, freshness)
        )
        return -jnp.sum(
            jnp.take_along_axis(logp_TV, targets_T[:, None], axis=-1)[:, 0] * weights_T
        )

    names = ("tokens", "positions", "segments", "targets", "weights")
    return (
        jax.vmap(row)(*(batch[name] for name in names)).sum() / batch["weights"].sum()
    )
