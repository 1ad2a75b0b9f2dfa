"""`python -m ladder_jax`: the command `ladder-jax`."""

from ladder_jax.cli import main

main()
