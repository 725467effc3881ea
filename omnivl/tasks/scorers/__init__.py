"""Scores of downstream tasks, equal to those of the official evaluations.

Pure functions over plain lists and numpy arrays; nothing of a model, and of omnivl only its errors. Shares lie in
[0, 1], where official programs often print per cent. Values of single queries are given too, wherever a score is their
mean, so that ``confidence.interval`` can stand beside it.
"""
