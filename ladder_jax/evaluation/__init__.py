"""Evaluation of a model: perplexity on documents, and tasks of lm-eval."""
