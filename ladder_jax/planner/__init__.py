"""Compiles ahead of time for chips that are not here, reads the schedule back, and says what it hides."""
