"""Watching a run: signs of life, hangs, failures, requests to stop."""
