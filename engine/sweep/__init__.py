"""Scaling experiments: many runs of one plan that differ in a few fields, and the evaluation of their results."""
