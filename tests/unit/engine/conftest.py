"""Lets the engine's unit tests use the synthetic chain of the distributed ones."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))
