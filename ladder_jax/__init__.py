"""Train, convert and serve Ladder-Residual transformers in JAX."""


def load(path, **options):
    """A checkpoint's model, config and tokenizer, in one call: see `ladder_jax.generate.load`."""
    from ladder_jax import generate  # here, so that importing the package starts nothing
    return generate.load(path, **options)
