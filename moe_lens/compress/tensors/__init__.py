"""Weights: how the tensors of a smaller model come from those of its parent."""
