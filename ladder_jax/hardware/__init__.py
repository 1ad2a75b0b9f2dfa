"""What machines do: chips, XLA's options, costs, compile targets, process start."""
