"""A generated world in which every task can be learnt: drawings on a ground, with exact answers, boxes and masks."""

from omnivl.data.sources.scenes.source import TASKS, SceneSource

__all__ = ["TASKS", "SceneSource"]
