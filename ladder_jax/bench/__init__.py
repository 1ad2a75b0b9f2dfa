"""Benchmarks: each runs this project and its peers side by side, on the same work, in one run."""
