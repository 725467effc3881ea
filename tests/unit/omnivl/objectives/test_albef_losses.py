"""The objectives that ALBEF is trained by against its formulas, and against torchmultimodal where it is installed."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.chain.gather import LocalGather
from omnivl.chain.objective import Heads
from omnivl.chain.state import State, StepLayout
from omnivl.objectives import VLM, UniVLC
from omnivl.objectives.univlc import UniVLCHead
from omnivl.objectives.vlm import MatchHead

B, P, STEPS, ALPHA = 4, 6, 5, 0.4
NAMES = ("visual_embedding", "text_embedding", "momentum_visual_embedding", "momentum_text_embedding")


def itc(embedded: dict[str, Tensor], queue: dict[str, Tensor], temperature: Tensor, alpha: float) -> Tensor:
    """ALBEF's: keys are momentum embeddings of batch and queue, targets the teacher's softmax and the own pair.

    Source: arXiv 2107.07651, eq. 1 and 6, and ``models/model_pretrain.py`` of the released code.
    """
    losses = []
    for query, key in (("visual", "text"), ("text", "visual")):
        keys = torch.cat([embedded[f"momentum_{key}_embedding"], queue[key]])
        with torch.no_grad():
            teacher = (embedded[f"momentum_{query}_embedding"] @ keys.t() / temperature).softmax(1)
            targets = alpha * teacher + (1 - alpha) * torch.eye(B, len(keys))
        scores = embedded[f"{query}_embedding"] @ keys.t() / temperature
        losses.append(-(scores.log_softmax(1) * targets).sum(1).mean())
    return (losses[0] + losses[1]) / 2


def itc_of_torchmultimodal(embedded: dict[str, Tensor], queue: dict[str, Tensor], temperature: Tensor, alpha: float):
    losses = pytest.importorskip(
        "torchmultimodal.modules.losses.albef",
        reason="torchmultimodal is not installed: its losses are compared where it is",
        exc_type=ImportError,
    )
    similar = {}
    for query, key in (("visual", "text"), ("text", "visual")):
        keys = torch.cat([embedded[f"momentum_{key}_embedding"], queue[key]])
        for twin in ("", "momentum_"):
            similar[twin + query] = embedded[f"{twin}{query}_embedding"] @ keys.t() / temperature
    order = ("visual", "text", "momentum_visual", "momentum_text")
    return losses.ImageTextContrastiveLoss()(*(similar[name] for name in order), alpha=alpha)


@pytest.mark.parametrize("reference", [itc, itc_of_torchmultimodal])
@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_contrast_is_albefs_where_each_sample_is_its_own_concept(reference, alpha) -> None:
    """Loss and gradient, over steps in which the queue fills and turns."""
    random = torch.Generator().manual_seed(0)
    objective = UniVLC(queue_size=3 * B, batch_keys="momentum", soft_target_alpha=alpha)
    head = UniVLCHead(3 * B, P)
    layout = StepLayout("image_text", B, 1)
    queue = {"visual": torch.empty(0, P), "text": torch.empty(0, P)}
    for step in range(STEPS):
        found = []
        raw = {name: torch.randn(B, P, generator=random) for name in NAMES}
        for ours in (True, False):
            leaves = {name: value.clone().requires_grad_() for name, value in raw.items()}
            embedded = {name: F.normalize(leaf, dim=-1) for name, leaf in leaves.items()}
            temperature = torch.tensor(0.07 + 0.01 * step, requires_grad=True)
            if ours:
                given = {name: one.detach() if "momentum" in name else one for name, one in embedded.items()}
                given |= {"identity": torch.arange(B) + step * B, "logit_scale": 1.0 / temperature}
                loss = objective.loss(
                    State({**given, "univlc/alpha": torch.tensor(alpha)}, layout), Heads(head), LocalGather()
                ).loss
            else:
                embedded |= {name: one.detach() for name, one in embedded.items() if "momentum" in name}
                loss = reference(embedded, queue, temperature, alpha)
            loss.backward()
            found.append(
                (loss.detach(), leaves["visual_embedding"].grad, leaves["text_embedding"].grad, temperature.grad)
            )
        for own, wanted in zip(*found, strict=True):
            torch.testing.assert_close(own, wanted)
        head.after_step(LocalGather())
        # The newest keys stand first in a list, and over the oldest ones in a ring: the loss does not see the order.
        for side in queue:
            newest = F.normalize(raw[f"momentum_{side}_embedding"], dim=-1)
            queue[side] = torch.cat([newest, queue[side]])[: 3 * B]


def test_negatives_are_drawn_by_the_softmax_without_the_own_pair() -> None:
    """ALBEF: softmax over the batch, diagonal zero, multinomial. Counted over evenly spread numbers."""
    torch.manual_seed(0)
    visual, text = F.normalize(torch.randn(B, P), dim=-1), F.normalize(torch.randn(B, P), dim=-1)
    scale, draws = torch.tensor(5.0), 2000
    counts = {"vlm/negative_visual": torch.zeros(B, B), "vlm/negative_text": torch.zeros(B, B)}
    for number in range(draws):
        given = {
            **{"visual_embedding": visual, "text_embedding": text, "identity": torch.arange(B), "logit_scale": scale},
            "vlm/uniforms": torch.full((B, 2), (number + 0.5) / draws),
        }
        drawn = VLM(epsilon=0.0).draw(State(given, StepLayout("image_text", B, 1)), LocalGather())
        for name, count in counts.items():
            count[torch.arange(B), drawn.rows[name]] += 1
    similar = {"vlm/negative_visual": text @ visual.t(), "vlm/negative_text": visual @ text.t()}
    for name, similarity in similar.items():
        weights = (scale * similarity).softmax(1).fill_diagonal_(0)
        torch.testing.assert_close(counts[name] / draws, weights / weights.sum(1, keepdim=True), rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
def test_saturated_similarities_do_not_stop_the_draw(epsilon: float) -> None:
    """Own pairs so alike that the softmax leaves nothing for others, where ALBEF's multinomial gets a sum of 0."""
    embedded = F.normalize(torch.eye(B), dim=-1)
    weights = (1000.0 * embedded @ embedded.t()).softmax(1).fill_diagonal_(0)
    assert weights.sum() == 0.0
    given = {
        **{"visual_embedding": embedded, "text_embedding": embedded, "identity": torch.arange(B)},
        **{"logit_scale": torch.tensor(1000.0), "vlm/uniforms": torch.rand(B, 2)},
    }
    drawn = VLM(epsilon=epsilon).draw(State(given, StepLayout("image_text", B, 1)), LocalGather())
    for rows in drawn.rows.values():
        assert (rows != torch.arange(B)).all()


def test_matching_is_one_cross_entropy_over_three_rows_a_sample() -> None:
    """ALBEF's order: own pairs, then each text with another's image, then each image with another's text."""
    torch.manual_seed(0)
    names = ("vlm/positive", "vlm/negative_visual", "vlm/negative_text")
    layout = StepLayout("image_text", B, 1, fused={name: slice(i * B, (i + 1) * B) for i, name in enumerate(names)})
    assert tuple(VLM().demands("image_text", B).joins) == names
    head, fused = MatchHead(P), torch.randn(3 * B, 2, P)
    state = State({"fused": fused, "vlm/has_negative": torch.ones(B, dtype=torch.bool)}, layout)
    made = VLM().loss(state, Heads(head), LocalGather()).loss
    labels = torch.cat([torch.ones(B), torch.zeros(2 * B)]).long()
    torch.testing.assert_close(made, F.cross_entropy(head.output(fused[:, 0]), labels))
    assert math.isfinite(made.item())
