"""Experts: banks of perceptrons, their products, and the exchange with banks on other processes."""
