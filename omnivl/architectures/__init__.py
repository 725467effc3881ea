"""Model architectures: which layers stand in the chain, with which sizes."""
