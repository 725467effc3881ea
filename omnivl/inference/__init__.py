"""Using a trained chain: embeddings, matching, writing texts, and the samples to do it with."""
