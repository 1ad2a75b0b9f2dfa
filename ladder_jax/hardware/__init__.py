"""What machines do: chips, XLA's options for them, costs, and how a process starts on them."""
