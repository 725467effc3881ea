"""Evaluation of a chain: retrieval, zero-shot labels and motions, captions, each beside chance and a pixel baseline."""

from omnivl.evaluation.config import BaselineReference, CaptionTask, RetrievalTask, TaskConfig, ZeroShotTask
from omnivl.evaluation.results import Gallery, GalleryRow, Score, TaskResult

__all__ = [
    "BaselineReference",
    "CaptionTask",
    "Gallery",
    "GalleryRow",
    "RetrievalTask",
    "Score",
    "TaskConfig",
    "TaskResult",
    "ZeroShotTask",
]
