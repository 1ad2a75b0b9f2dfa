"""Compiles programs for chips that are not here, and says what they hide and cost."""
