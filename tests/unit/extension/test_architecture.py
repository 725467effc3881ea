"""An architecture that is in no union is built, trained, handed over and measured like the others."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import pytest
import torch
from tiny_chain import TOKENS, make_batch
from torch import Tensor, nn

from engine.hosts.plain import PlainHost
from engine.run.handover import hand_over
from engine.step.freeze import freeze_idle
from engine.step.optimizer import OptimizerConfig
from omnivl.architectures import OmniVL
from omnivl.architectures.base import Architecture, Kit, Layers, missing_streams
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import ChainLayer
from omnivl.chain.layout import plan_layout
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout
from omnivl.data.sizes import InputSizes
from omnivl.errors import ModelError
from omnivl.objectives import VLM, UniVLC
from omnivl.parts.join import JoinRows
from omnivl.parts.losses import Losses
from omnivl.parts.project import Project
from omnivl.parts.sizes import Transformer


class Bags(ChainLayer):
    """The first layer: a bag of pixels and a bag of words, each of its own width."""

    stack = "embed"

    def __init__(self, pixels: int, visual: int, vocab_size: int, text: int) -> None:
        super().__init__()
        self.visual, self.words = nn.Linear(pixels, visual), nn.Embedding(vocab_size, text)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of the pixels' map, forward and backward."""
        return 3 * 2.0 * layout.batch_size * self.visual.weight.numel()

    def forward(self, state: State) -> State:
        pixels = state["frames"][:, 0].float().flatten(1) / 255
        words = self.words(state["token_ids"]).mean(1)
        mask = torch.ones(len(words), 1, dtype=torch.bool)
        return state.updated(visual=self.visual(pixels)[:, None], text=words[:, None], text_mask=mask)


@dataclass(frozen=True)
class BagOfWords(Architecture):
    """Two linear maps of unequal widths."""

    kind: Literal["bag_of_words"] = "bag_of_words"
    image_size: int = 16
    vocab_size: int = 50
    visual: Transformer = field(default_factory=lambda: Transformer(hidden_size=12, num_heads=1, layers=0))
    text: Transformer = field(default_factory=lambda: Transformer(hidden_size=7, num_heads=1, layers=0))

    streams: ClassVar[tuple[str, ...]] = ("visual", "text", "embedding")

    @property
    def inputs(self) -> InputSizes:
        return InputSizes(self.image_size, self.image_size, 1, self.image_size, 1, 8)

    @property
    def heads(self) -> HeadSizes:
        return HeadSizes({"visual": 12, "text": 7}, 8, self.vocab_size, 5, self.image_size, 1, self.image_size)

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        return {"visual": self.visual, "text": self.text}

    def layers(self, kit: Kit) -> Layers:
        widths = self.visual.hidden_size, self.text.hidden_size
        yield "embed", Bags(3 * self.image_size**2, widths[0], self.vocab_size, widths[1])
        yield "contrast", Project(self.heads, kit.objectives, self.momentum)
        yield "join", JoinRows(kit.objectives, kit.gather)
        yield "losses", Losses(self.heads, kit.objectives, kit.gather)


OBJECTIVES = (UniVLC(),)


def test_it_trains_under_a_host() -> None:
    torch.manual_seed(0)
    chain = build_chain(BagOfWords(), OBJECTIVES, TOKENS)
    batch = make_batch("image_text", OBJECTIVES)
    freeze_idle(chain, [plan_layout(OBJECTIVES, "image_text", batch.size, 1)])
    host = PlainHost(
        chain,
        OptimizerConfig(lr=1e-2),
        lambda kind, size, frames, entry: plan_layout(OBJECTIVES, kind, size, frames, entry),
        total_steps=30,
    )
    losses: list[Tensor | float] = [host.step([batch], step).loss for step in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_what_it_lacks_is_refused_by_name() -> None:
    assert missing_streams(BagOfWords(), VLM()) == ["fused"]
    with pytest.raises(ModelError) as caught:
        build_chain(BagOfWords(), (UniVLC(), VLM()), TOKENS)
    assert str(caught.value) == (
        "objective 'vlm' asks for the stream 'fused'; architecture 'bag_of_words' has visual, text, embedding; "
        "take the objective out or change model.kind"
    )


def test_its_weights_are_handed_over() -> None:
    first, second = (build_chain(BagOfWords(), OBJECTIVES, TOKENS) for _ in range(2))
    report = hand_over(second, first.state_dict(), "first")
    assert report.created == report.dropped == ()
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_it_says_its_sizes() -> None:
    wider = replace(BagOfWords(), text=Transformer(hidden_size=9, num_heads=1, layers=0))
    assert BagOfWords().widths != wider.widths
    assert not BagOfWords().has_routers
    assert BagOfWords().portable() == BagOfWords()


def test_it_says_what_is_recomputed_and_can_be_asked_for_other() -> None:
    assert BagOfWords().recomputed == ("none",)
    whole = BagOfWords().recomputing("block")
    assert (whole.recomputed, whole.visual.recompute, whole.text.recompute) == (("block",), "block", "block")
    assert OmniVL().recomputing("ffn") == OmniVL(recompute="ffn")
    assert OmniVL(recompute="ffn").recomputed == ("ffn",)


def test_own_sizes_that_an_architecture_does_not_read_are_refused() -> None:
    assert list(BagOfWords().misfits()) == []
    (misfit,) = BagOfWords(sizes="native").misfits()
    assert str(misfit).endswith("got 'native'; allowed 'fixed' with architecture 'bag_of_words'; set it to 'fixed'")
    assert list(OmniVL(sizes="native").misfits()) == []
