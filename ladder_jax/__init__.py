"""Train and serve Ladder-Residual transformers in JAX."""


def load(path, **options):
    """A checkpoint's model, config and tokenizer, in one call: see `ladder_jax.loading.load`."""
    from ladder_jax.loading import (
        load as load_checkpoint,  # here, so that importing the package starts nothing
    )

    return load_checkpoint(path, **options)
