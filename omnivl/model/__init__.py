"""The chain: embeddings, encoder blocks, contrast, grounded decoders and losses, as a list of layers over one state."""
