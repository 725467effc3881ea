"""The command line and the ways to start processes. Knows nothing of the inside of a model."""
