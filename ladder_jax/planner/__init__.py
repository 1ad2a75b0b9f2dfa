"""Compiles programs for other chips, and reports how well communication overlaps."""
