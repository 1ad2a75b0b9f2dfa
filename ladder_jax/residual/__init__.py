"""How blocks meet: the stream between them, and reductions that run behind compute."""
