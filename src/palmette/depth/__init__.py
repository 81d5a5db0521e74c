"""Depth: methods that remove activations and blocks, and `shrink`, which makes the removal physical."""
