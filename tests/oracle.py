"""A small model for tests of tasks, and an encoder that predicts what a function says."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.objective import Objective
from omnivl.data.sources.base import Sample
from omnivl.data.tokenizer import load_tokenizer
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet

TOKENIZER = load_tokenizer("emoji")
MODEL = replace(
    OmniVL.presets["tiny"],
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "alignment_layers": 1},
    **{"generation_layers": 1, "image_size": 32, "video_size": 32, "patch_size": 8, "text_length": 64, "num_frames": 8},
    **{"vocab_size": TOKENIZER.special.vocab_size},
)
FOOD = {"style": ("fluent",), "group": ("food & drink",), "part": ("test",)}
Says = Callable[[Sample, str], object]


class Oracle(Encoder):
    """Predicts what a function says of each sample and text."""

    def predict(
        self, objective: str, pictures: PictureSet, texts: Sequence[str] = (), candidates: Tensor | None = None
    ) -> Tensor:
        said = []
        for place, sample in enumerate(pictures.samples):
            if candidates is None:
                said.append(torch.as_tensor(self.says(sample, texts[place] if texts else "")))  # type: ignore[attr-defined]
            else:
                said.append(
                    torch.stack([torch.as_tensor(self.says(sample, texts[one])) for one in candidates[place]])  # type: ignore[attr-defined]
                )
        return torch.stack(said)


def encoder_of(*objectives: Objective, says: Says | None = None, model: OmniVL = MODEL) -> Encoder:
    torch.manual_seed(0)
    chain = build_chain(model, objectives, TOKENIZER.special)
    made = (Encoder if says is None else Oracle)(
        chain, model, TOKENIZER, LocalGather(), torch.device("cpu"), batch_size=8
    )
    if says is not None:
        object.__setattr__(made, "says", says)
    return made
