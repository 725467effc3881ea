"""Work and outlines of a plan's stages, each counted once however many layouts are estimated with it."""

from collections.abc import Callable, Hashable

from engine.estimate.report import device_of, outlined
from engine.estimate.traffic import Cluster
from engine.estimate.work import ModelWork, model_work
from engine.plan.plan import StagePlan
from omnivl.chain.chain import Chain
from omnivl.data.tokenizer import Tokenizer


class Counts:
    """What layouts of a stage with equal micro-batches and recomputation have in common."""

    def __init__(self, tokenizer: Tokenizer, cluster: Cluster, words: int | None = None) -> None:
        """Counts nothing yet.

        Args:
            tokenizer: The plan's.
            cluster: Where the stages run.
            words: Of a caption; None: captions are as long as the model reads.
        """
        self._tokenizer, self._cluster, self._words = tokenizer, cluster, words
        self._works: dict[Hashable, ModelWork] = {}
        self._chains: dict[Hashable, Chain] = {}

    def work(self, stage: StagePlan, progress: Callable[[str], object] = lambda what: None) -> ModelWork:
        """The work of a micro-batch, with rows joined over all processes: in a pipeline fewer are joined.

        Args:
            stage: Of the plan, in any layout.
            progress: Called with what is about to be counted.
        """
        key = self._key(stage)
        if key not in self._works:
            mode = " and ".join(stage.model.recomputed)
            progress(f"a micro-batch of {stage.batch.micro_batch_size_per_gpu}, recomputed: {mode}")
            device, processes = device_of(self._cluster), self._cluster.processes
            self._works[key] = model_work(stage, self._tokenizer, processes, device, self._words)
        return self._works[key]

    def outline(self, stage: StagePlan) -> Chain:
        """The chain without storage."""
        key = self._key(stage)
        if key not in self._chains:
            self._chains[key] = outlined(stage, self._tokenizer)
        return self._chains[key]

    def _key(self, stage: StagePlan) -> Hashable:
        return stage.name, stage.batch.micro_batch_size_per_gpu, stage.model.recomputed, stage.contrasts_step
