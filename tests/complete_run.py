"""A run's folder as it is after its stages, with weights that nothing has trained."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.disk.run_folder import RunFolder
from engine.plan.parse import parse_plan
from omnivl.architectures.build import build_chain
from omnivl.data.tokenizer import load_tokenizer


def write_complete_run(path: Path, text: str, *, stages: int, spread: float = 1.0) -> Path:
    """Writes the folder ``path``, in which the first ``stages`` of a plan are complete.

    Args:
        path: Is made.
        text: The plan.
        stages: How many are complete.
        spread: Factor of the matrices. Above 1 it spreads the outputs out: near ties would hang on the order of
            additions.
    """
    path.mkdir()
    plan, run = parse_plan(text), RunFolder(path)
    run.plan.write_text(plan.to_yaml())
    run.environment.write_text("{}")
    for index, stage in enumerate(plan.stages[:stages]):
        torch.manual_seed(index)
        chain = build_chain(stage.model, stage.objectives, load_tokenizer(plan.tokenizer).special)
        with torch.no_grad():
            for parameter in chain.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(spread)
        folder = run.stage(index, stage.name)
        folder.path.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in chain.state_dict().items()}, folder.weights)
        folder.mark_complete(stage.steps)
    return path
