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
    s, size = config.rope_scaling, 1.0
    if s.kind == "linear":  # positions are divided
        frequency = frequency / s.factor
    elif s.kind == "yarn":  # a ramp over the pairs' indices, and larger scores
        at = lambda turns: (
            half
            * (
                jnp.log(s.original_length / (2 * jnp.pi * turns))
                / jnp.log(config.rope_theta)
            )
        )
        low = jnp.maximum(jnp.floor(at(s.beta_fast)), 0)
        high = jnp.minimum(jnp.ceil(at(s.beta_slow)), 2 * half - 1)
        ramp = jnp.clip((jnp.arange(half) - low) / (high - low), 0, 1)
        frequency = (1 - ramp) * frequency + ramp * frequency / s.factor
        size = 0.1 * jnp.log(s.factor) + 1
    elif s.factor != 1:  # Llama 3.1: three bands of wavelengths
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
    cosine, sine = size * jnp.cos(angle)[:, None], size * jnp.sin(angle)[:, None]
    first, second = x_TNH[..., :half], x_TNH[..., half:]
    return jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )


def share(size, ranks, rank):
    """1 for the heads or units, of `size`, that a rank holds; 0 for the others."""
    return jnp.float32(jnp.arange(size) * ranks // size == rank)


def attention(p, u_TD, positions_T, segments_T, config, layer, ranks=1, rank=0):
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
    if layer not in parse_layers(config.nope_layers, config.layers):
        q, k = rope(q, positions_T, config), rope(k, positions_T, config)
    # Every query head gets a copy of its own.
    k, v = (jnp.repeat(x, N // K, axis=1) for x in (k, v))
    T = len(q)
    allowed = jnp.tril(jnp.ones((T, T), bool)) & (
        segments_T[:, None] == segments_T[None]
    )
    if config.sliding_window and layer in parse_layers(
        config.window_layers, config.layers
    ):
        distance = jnp.arange(T)[:, None] - jnp.arange(T)
        allowed &= distance < config.sliding_window
    scores = jnp.einsum("tnh,snh->nts", q, k) / jnp.sqrt(config.head_dim)
    weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30))
    heads = jnp.einsum("nts,snh->tnh", weights, v) * share(N, ranks, rank)[:, None]
    return jnp.einsum("tnh,nhd->td", heads, p.wo[...])


def mlp(p, u_TD, config, ranks=1, rank=0):
    gate, up = u_TD @ p.gate[...], u_TD @ p.up[...]
    if p.gate_bias is not None:
        gate, up = gate + p.gate_bias[...], up + p.up_bias[...]
    if config.activation == "silu":
        units = gate / (1 + jnp.exp(-gate)) * up
    elif config.activation == "gelu":  # by the normal distribution function
        units = gate * (1 + jax.lax.erf(gate / jnp.sqrt(2.0))) / 2 * up
    else:
        inner = jnp.sqrt(2 / jnp.pi) * (gate + 0.044715 * gate**3)
        units = gate * (1 + jnp.tanh(inner)) / 2 * up
    return (units * share(config.ffn_dim, ranks, rank)) @ p.down[...]


def bias(p):
    """The bias on a block's output, which no rank has a share of."""
    if hasattr(p, "wo"):
        return 0 if p.bo is None else p.bo[...]
    return 0 if p.down_bias is None else p.down_bias[...]


def stream(model, config, tokens_T, positions_T, segments_T, ranks=1, freshness=0.0):
    """The final residual stream [T, D]; with dtp, every rank's.

    `ranks` matters to desync and dtp alone, and `freshness` to ladder and delays: a
    block reads that share of the stream of standard, and the rest of the stale stream.
    """
    x = jnp.asarray(model.embedding[...])[tokens_T]
    eps = config.norm_eps
    layers = [
        jax.tree.map(lambda w, i=i: w[i], model.layers) for i in range(config.layers)
    ]
    head_sum = lambda i, u, **rank: attention(
        layers[i].attention, u, positions_T, segments_T, config, i, **rank
    )
    unit_sum = lambda i, u, **rank: mlp(layers[i].mlp, u, config, **rank)
    attend = lambda i, u: head_sum(i, u) + bias(layers[i].attention)
    feed = lambda i, u: unit_sum(i, u) + bias(layers[i].mlp)
    kind, _, argument = config.residual.partition(":")

    if kind == "standard":
        for i, layer in enumerate(layers):
            x = x + attend(i, norm(x, layer.attention.norm[...], eps))
            x = x + feed(i, norm(x, layer.mlp.norm[...], eps))
        return x

    if kind == "parallel":
        for i, layer in enumerate(layers):
            u = norm(x, layer.attention.norm[...], eps)
            x = x + attend(i, u) + feed(i, u)
        return x

    if kind == "hybrid":
        # The two accumulated streams of the published conversion code.
        attention_stream = mlp_stream = x
        for i, layer in enumerate(layers):
            if i in parse_layers(argument, config.layers):
                previous = mlp_stream
                attention_stream = previous + attend(
                    i, norm(attention_stream, layer.attention.norm[...], eps)
                )
                mlp_stream = attention_stream + feed(
                    i, norm(previous, layer.mlp.norm[...], eps)
                )
            else:
                attention_stream = mlp_stream + attend(
                    i, norm(mlp_stream, layer.attention.norm[...], eps)
                )
                mlp_stream = attention_stream + feed(
                    i, norm(attention_stream, layer.mlp.norm[...], eps)
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
                    history[-1] + (attend(i, u) if part == "attention" else feed(i, u))
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
                        head_sum(i, u, **own)
                        if part == "attention"
                        else unit_sum(i, u, **own)
                    )
                # Every rank adds the bias to its own stream, reduced or not.
                if (block + 1) % every == 0 or block == blocks - 1:
                    total = sum(outputs) + bias(module) + sum(copies) / ranks
                    copies = [total] * ranks
                else:
                    copies = [
                        copy + output + bias(module)
                        for copy, output in zip(copies, outputs)
                    ]
        return copies[0]
    if kind == "dtp":
        return dtp_streams(head_sum, unit_sum, config, layers, x, int(argument), ranks)
    raise AssertionError(config.residual)


def dtp_streams(head_sum, unit_sum, config, layers, x, d, ranks):
    """Every rank's final stream [ranks, T, D], from the equations in residual/dtp.py.

    `outputs[n][l]` is o_l^n. The bias on a block's output is rank 0's, which sends it
    to the others with its partial; every rank adds that of a block that is not sent.
    """
    streams, outputs = [x] * ranks, []
    blocks = [(i, part) for i in range(len(layers)) for part in ("attention", "mlp")]
    for n, (i, part) in enumerate(blocks):
        module, own = getattr(layers[i], part), []
        for rank in range(ranks):
            u = norm(streams[rank], module.norm[...], config.norm_eps)
            partial = head_sum if part == "attention" else unit_sum
            output = partial(i, u, ranks=ranks, rank=rank)
            has_bias = rank == 0 or n >= len(blocks) - d
            own.append(output + bias(module) if has_bias else output)
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
    if text in ("all", "none"):
        return range(count if text == "all" else 0)
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
