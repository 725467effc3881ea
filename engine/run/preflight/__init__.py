"""Looks at everything that a plan names outside of itself, before anything is trained.

A run of hours shall not fail at its third stage for a file that was never there.
"""

from engine.run.preflight.data import Glances
from engine.run.preflight.findings import Finding, Look
from engine.run.preflight.look import look_at

__all__ = ["Finding", "Glances", "Look", "look_at"]
