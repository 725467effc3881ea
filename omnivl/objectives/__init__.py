"""Training objectives, one file each.

A new objective is a new file and one entry in ``ObjectiveConfig``.
"""

from typing import Annotated

from pydantic import Field

from omnivl.chain.demands import Demands, Join
from omnivl.chain.objective import Objective, ObjectiveLoss, PrepareContext
from omnivl.objectives.answer import Answer
from omnivl.objectives.choose import Choose
from omnivl.objectives.classify import Classify
from omnivl.objectives.diffusion import Diffusion
from omnivl.objectives.distil import Distil
from omnivl.objectives.distil_matching import DistilMatching
from omnivl.objectives.interleaved_lm import InterleavedLM
from omnivl.objectives.intra_modal import IntraModal
from omnivl.objectives.itc import ITC
from omnivl.objectives.itm import ITM
from omnivl.objectives.lm import LM
from omnivl.objectives.local_mi import LocalMI
from omnivl.objectives.locate import Locate
from omnivl.objectives.mcm import MCM
from omnivl.objectives.mdm import MDM
from omnivl.objectives.mfm import MFM
from omnivl.objectives.mlm import MLM
from omnivl.objectives.mmm import MMM
from omnivl.objectives.mrm import MRM
from omnivl.objectives.prefix_lm import PrefixLM
from omnivl.objectives.prototypes import Prototypes
from omnivl.objectives.quantize import Quantize
from omnivl.objectives.recognize import Recognize
from omnivl.objectives.region import Region
from omnivl.objectives.regress import Regress
from omnivl.objectives.segment import Segment
from omnivl.objectives.split_lm import SplitLM
from omnivl.objectives.univlc import NegativeWeights, UniVLC
from omnivl.objectives.vlm import VLM
from omnivl.objectives.vqa import VQA

ObjectiveConfig = Annotated[
    (MLM | MRM | MFM | MCM | MDM | UniVLC | VLM | LM | ITC | ITM | IntraModal | LocalMI | MMM | Quantize)
    | (PrefixLM | SplitLM | InterleavedLM)
    | (VQA | Answer | Classify | Choose | Locate | Region | Segment | Regress | Recognize)
    | (Diffusion | Distil | DistilMatching | Prototypes),
    Field(discriminator="kind"),
]
"""All objectives that a plan can name, discriminated by ``kind``."""

__all__ = [
    "ITC",
    "ITM",
    "LM",
    "MCM",
    "MDM",
    "MFM",
    "MLM",
    "MMM",
    "MRM",
    "VLM",
    "VQA",
    "Answer",
    "Choose",
    "Classify",
    "Demands",
    "Diffusion",
    "Distil",
    "DistilMatching",
    "InterleavedLM",
    "IntraModal",
    "Join",
    "LocalMI",
    "Locate",
    "NegativeWeights",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveLoss",
    "PrefixLM",
    "PrepareContext",
    "Prototypes",
    "Quantize",
    "Recognize",
    "Region",
    "Regress",
    "Segment",
    "SplitLM",
    "UniVLC",
]
