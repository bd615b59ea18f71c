"""Adapts any Hugging Face model by training a few extra tensors."""
