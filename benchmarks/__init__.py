"""Benchmarks: ratios measured side by side. ``python -m benchmarks`` runs them; see README.md."""
