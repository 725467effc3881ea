"""Routers, one file each.

A new router is a new file and one entry in ``AnyRouterConfig``.
"""

from typing import Annotated

from pydantic import Field

from moe.routers.base import Allowed, LinearRouter, Router, RouterConfig
from moe.routers.expert_choice import ExpertChoice, ExpertChoiceRouter
from moe.routers.token_choice import NoisyRouterLossConfig, TokenChoice, TokenChoiceRouter

AnyRouterConfig = Annotated[TokenChoice | ExpertChoice, Field(discriminator="kind")]
"""The options of all routers that a plan can name, told apart by ``kind``."""

__all__ = [
    "Allowed",
    "AnyRouterConfig",
    "ExpertChoice",
    "ExpertChoiceRouter",
    "LinearRouter",
    "NoisyRouterLossConfig",
    "Router",
    "RouterConfig",
    "TokenChoice",
    "TokenChoiceRouter",
]
