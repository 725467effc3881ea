"""A run on disk: its folder, checkpoints, weights files, rollbacks."""
