"""Looks at the weights that stages start from: by names and shapes alone, on the meta device."""

from pathlib import Path as FilePath

import torch

from engine.disk.aside import HEADS
from engine.plan.plan import Plan, StagePlan
from engine.run.handover import hand_over
from engine.run.preflight.findings import Look
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.data.tokenizer import Tokenizer, load_readers
from omnivl.pretrained.files import read_weights
from omnivl.pretrained.load import Part, load_pretrained, read_exported


class WeightsLook:
    """Looks at the starting values of a plan's stages."""

    def __init__(self, plan: Plan, look: Look, tokenizer: Tokenizer | None) -> None:
        """Builds nothing yet.

        Args:
            plan: Without mistakes.
            look: Takes the findings.
            tokenizer: The plan's; None where it cannot be loaded. Weights are then looked at without their fit.
        """
        self._plan, self._look, self._tokenizer = plan, look, tokenizer

    def start(self, index: int) -> None:
        """Looks at what a stage starts from."""
        stage = self._plan.stages[index]
        chain = self._chain(stage, ("stages", index, "model"))
        for part, folder in stage.weights.folders.items():
            with self._look.at(("stages", index, "weights", part)):
                if chain is None:
                    read_weights(FilePath(folder), shapes_only=True)
                else:
                    _fit_foreign(chain, stage, part, folder)
        if stage.init_from is not None and chain is not None:
            earlier = self._chain(self._plan.stage(stage.init_from), None)
            if earlier is not None:
                with self._look.at(("stages", index, "init_from")), torch.device("meta"):
                    weights = dict(earlier.state_dict())
                    hand_over(chain, weights, stage.init_from, starts_from=stage.model.starts_from)

    def _chain(self, stage: StagePlan, path: tuple[str | int, ...] | None) -> Chain | None:
        """A stage's chain without storage; None where it cannot be built, which is a problem at ``path``."""
        if self._tokenizer is None:
            return None
        look = Look()
        chain: Chain | None = None
        with look.at(path or ()), torch.device("meta"):
            load_readers(stage.model.text_inputs, self._tokenizer)
            chain = build_chain(stage.model, stage.objectives, self._tokenizer.special)
        if path is not None:
            self._look.problems += look.problems
        return chain


def _fit_foreign(chain: Chain, stage: StagePlan, part: Part, folder: str) -> None:
    """Loads the shapes of a folder's weights into a chain without storage.

    Raises:
        UserError: There are no weights, or they do not fit.
    """
    exported = read_exported(FilePath(folder), part, shapes_only=True)
    if exported is None:
        load_pretrained(chain, stage.model, FilePath(folder), part=part, shapes_only=True)
        return
    own = chain.state_dict().keys()
    given = {name: tensor for name, tensor in exported.items() if not name.startswith(HEADS) or name in own}
    with torch.device("meta"):
        hand_over(chain, given, folder, starts_from=stage.model.starts_from)
