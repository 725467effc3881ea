"""Evaluation tasks for trained stages, one file each.

A new task is a new file and one entry in ``TaskConfig``. Every plan that is read imports all of these files; therefore
they import special packages (pandas, sacrebleu) only when they run.
"""

from typing import Annotated

from pydantic import Field

from omnivl.tasks.captions import CaptionTask
from omnivl.tasks.classification import ClassificationTask
from omnivl.tasks.drawing import DrawingTask
from omnivl.tasks.few_shot import FewShotTask
from omnivl.tasks.gqa import GQATask
from omnivl.tasks.grounded_captions import GroundedCaptionsTask
from omnivl.tasks.grounding import GroundingTask, SegmentationTask
from omnivl.tasks.matching import MatchingTask
from omnivl.tasks.needs import Embeddings, Head, Lack, Need, Provided
from omnivl.tasks.neighbors import NeighborsTask
from omnivl.tasks.options import OptionsTask
from omnivl.tasks.phrases import PhrasesTask
from omnivl.tasks.pixel_baseline import BaselineReference
from omnivl.tasks.predicting import PredictingTask
from omnivl.tasks.results import Drawing, Example, Gallery, GalleryRow, ResultFile, Score, TaskResult
from omnivl.tasks.retrieval import RetrievalTask
from omnivl.tasks.routing.task import RoutingTask
from omnivl.tasks.sentiment import SentimentTask
from omnivl.tasks.task import Task
from omnivl.tasks.vqa import VQATask
from omnivl.tasks.zero_shot import ZeroShotTask

TaskConfig = Annotated[
    (RetrievalTask | ZeroShotTask | NeighborsTask | CaptionTask | RoutingTask | MatchingTask)
    | (VQATask | GQATask | ClassificationTask | OptionsTask | GroundingTask | PhrasesTask)
    | (SegmentationTask | SentimentTask | FewShotTask | GroundedCaptionsTask | DrawingTask),
    Field(discriminator="kind"),
]
"""All tasks that ``evaluate.tasks`` of a plan can name, discriminated by ``kind``."""

__all__ = [
    "BaselineReference",
    "CaptionTask",
    "ClassificationTask",
    "Drawing",
    "DrawingTask",
    "Embeddings",
    "Example",
    "FewShotTask",
    "GQATask",
    "Gallery",
    "GalleryRow",
    "GroundedCaptionsTask",
    "GroundingTask",
    "Head",
    "Lack",
    "MatchingTask",
    "Need",
    "NeighborsTask",
    "OptionsTask",
    "PhrasesTask",
    "PredictingTask",
    "Provided",
    "ResultFile",
    "RetrievalTask",
    "RoutingTask",
    "Score",
    "SegmentationTask",
    "SentimentTask",
    "Task",
    "TaskConfig",
    "TaskResult",
    "VQATask",
    "ZeroShotTask",
]
