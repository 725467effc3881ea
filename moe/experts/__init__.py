"""Experts: perceptrons side by side, their products, and the way to those on other processes."""
