"""Checkpoints of other tools: Hugging Face folders and GGUF files, read and written."""
