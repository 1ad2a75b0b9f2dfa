"""The residual stream between blocks, and reductions that run beside compute."""
