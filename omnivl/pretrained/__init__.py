"""Weights of Hugging Face checkpoints as starting values."""
