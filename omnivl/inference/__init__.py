"""Inference with a trained chain: embeddings, matching, text generation, and sets of samples."""
