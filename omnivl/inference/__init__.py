"""What a trained chain is used for: embeddings, matching, writing texts."""
