"""A trained stage as an object of Python: what ``omnivl.load`` returns (``docs/python.md``)."""

from omnivl.api.model import Match, Model
from omnivl.api.routing import LayerRouting, Routing

__all__ = ["LayerRouting", "Match", "Model", "Routing"]
