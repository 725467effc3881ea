"""Layers and blocks that architectures are made of."""
