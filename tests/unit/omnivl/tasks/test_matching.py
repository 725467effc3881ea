"""Retrieval by the head that matches."""

import pytest
import torch

from omnivl.architectures import ViLT
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.data.tokenizer import load_tokenizer
from omnivl.inference.encoder import Encoder
from omnivl.objectives import ITM, MLM
from omnivl.parts.sizes import Transformer, Words
from omnivl.tasks import Lack, MatchingTask, Provided
from omnivl.tasks.run import run_tasks

TOKENIZER = load_tokenizer("emoji")
MODEL = ViLT(
    blocks=Transformer(hidden_size=16, num_heads=2, layers=1),
    words=Words(length=12, vocab_size=TOKENIZER.special.vocab_size),
    image_size=16,
    patch_size=8,
)
TASK = MatchingTask(where={"style": ("twemoji",), "label": ("bugs", "fruit")}, max_samples=10)


class Knowing(Encoder):
    """Gives every picture its own caption, the first two each other's."""

    asked: list[int]

    def predict(self, objective, pictures, texts=(), candidates=None):
        assert objective == "itm"
        self.__dict__.setdefault("asked", []).append(candidates.shape[1])
        own = torch.tensor([texts.index(caption) for caption in pictures.captions])
        own[[0, 1]] = own[[1, 0]]
        return (candidates == own[:, None]).float()


def make_encoder(cls=Encoder):
    torch.manual_seed(0)
    chain = build_chain(MODEL, (ITM(),), TOKENIZER.special)
    return cls(chain, MODEL, TOKENIZER, LocalGather(), torch.device("cpu"), batch_size=4)


def test_every_text_is_matched_with_every_picture():
    encoder = make_encoder(Knowing)
    (result,) = run_tasks([TASK], encoder)
    scores = {score.metric: score for score in result.scores}
    assert [scores[f"{way} R@1"].value for way in ("image->text", "text->image")] == pytest.approx([0.8, 0.8])
    assert scores["image->text R@1"].chance == pytest.approx(0.1)
    assert {score.count for score in result.scores} == {10}
    assert encoder.__dict__["asked"] == [4, 4, 2], "texts batch by batch"


def test_it_runs_on_a_model_without_embeddings():
    (result,) = run_tasks([TASK], make_encoder())
    assert len(result.scores) == 8
    assert all(0 <= score.value <= 1 for score in result.scores if score.graded)


def test_it_needs_the_head():
    assert TASK.lacks(Provided(MODEL, (ITM(),))) == []
    assert TASK.lacks(Provided(MODEL, (MLM(),))) == [Lack("does not train 'itm'", "add the objective 'itm'")]
