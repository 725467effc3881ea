"""Evaluation of a chain: retrieval, labels, motions, captions beside chance and a pixel baseline; routing."""

from omnivl.tasks.config import (
    BaselineReference,
    CaptionTask,
    RetrievalTask,
    RoutingTask,
    TaskConfig,
    ZeroShotTask,
)
from omnivl.tasks.results import Gallery, GalleryRow, ResultFile, Score, TaskResult

__all__ = [
    "BaselineReference",
    "CaptionTask",
    "Gallery",
    "GalleryRow",
    "ResultFile",
    "RetrievalTask",
    "RoutingTask",
    "Score",
    "TaskConfig",
    "TaskResult",
    "ZeroShotTask",
]
