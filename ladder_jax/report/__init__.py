"""`ladder-jax report`: one page about one run, or several beside each other."""
