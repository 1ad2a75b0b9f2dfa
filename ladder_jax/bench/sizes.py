"""Defines the models, with random weights, that the benchmarks measure."""

from ladder_jax.config import Model

M125 = Model(
    vocab_size=32000,
    dim=768,
    layers=12,
    heads=12,
    kv_heads=12,
    head_dim=64,
    ffn_dim=2048,
)

TRAIN_SIZES = {
    "tiny": Model(
        vocab_size=256,
        dim=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        ffn_dim=128,
    ),
    "m10": Model(
        vocab_size=4096,
        dim=320,
        layers=6,
        heads=5,
        kv_heads=5,
        head_dim=64,
        ffn_dim=896,
    ),
    "m125": M125,
}

DECODE_SIZES = {
    "tiny": Model(
        vocab_size=512,
        dim=128,
        layers=4,
        heads=4,
        kv_heads=4,
        head_dim=32,
        ffn_dim=384,
    ),
    "small": Model(
        vocab_size=4096,
        dim=512,
        layers=8,
        heads=8,
        kv_heads=4,
        head_dim=64,
        ffn_dim=1536,
    ),
    "m125": M125,
    "1b": Model(
        vocab_size=128256,
        dim=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        ffn_dim=8192,
    ),
    "8b": Model(
        vocab_size=128256,
        dim=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn_dim=14336,
    ),
}


def multiplied_parameters(model_config: Model) -> int:
    """The number of parameters that a token is multiplied by.

    The input embedding is looked up and does not count.
    """
    import jax

    from ladder_jax import model

    count = sum(x.size for x in jax.tree.leaves(model.abstract(model_config)))
    if model_config.tie_embeddings:
        return count
    return count - model_config.vocab_size * model_config.dim
