"""Hosts run the chain: ``plain`` in bare PyTorch, ``zero`` under DeepSpeed."""
