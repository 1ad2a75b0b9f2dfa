"""The machine: its chips, XLA's options, costs, and how a process starts."""
