"""Model architectures, one file each: the layers of the chain and their sizes.

A new architecture is a new file and one entry in ``ArchitectureConfig``.
"""

from typing import Annotated

from pydantic import Field

from omnivl.architectures.albef import ALBEF
from omnivl.architectures.align import ALIGN
from omnivl.architectures.base import Architecture, Kit
from omnivl.architectures.blip import BLIP
from omnivl.architectures.blip2 import BLIP2
from omnivl.architectures.clip import CLIP
from omnivl.architectures.coca import CoCa
from omnivl.architectures.flamingo import Flamingo
from omnivl.architectures.flava import FLAVA
from omnivl.architectures.frozen import Frozen
from omnivl.architectures.git import GIT
from omnivl.architectures.meter import METER
from omnivl.architectures.omnivl import OmniVL, VisionConfig
from omnivl.architectures.pali import PaLI
from omnivl.architectures.simvlm import SimVLM
from omnivl.architectures.unified import Unified
from omnivl.architectures.vilt import ViLT
from omnivl.architectures.xvlm import XVLM

ArchitectureConfig = Annotated[
    OmniVL
    | Unified
    | CLIP
    | ViLT
    | ALBEF
    | BLIP
    | BLIP2
    | FLAVA
    | ALIGN
    | CoCa
    | GIT
    | SimVLM
    | PaLI
    | METER
    | Flamingo
    | Frozen
    | XVLM,
    Field(discriminator="kind"),
]
"""All architectures that a plan can name, discriminated by ``kind``."""

__all__ = [
    "ALBEF",
    "ALIGN",
    "BLIP",
    "BLIP2",
    "CLIP",
    "FLAVA",
    "GIT",
    "METER",
    "XVLM",
    "Architecture",
    "ArchitectureConfig",
    "CoCa",
    "Flamingo",
    "Frozen",
    "Kit",
    "OmniVL",
    "PaLI",
    "SimVLM",
    "Unified",
    "ViLT",
    "VisionConfig",
]
