from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.disk.aside import heads_aside
from engine.errors import CheckpointError
from engine.run.handover import hand_over
from moe.config import AttributeConfig, FeedForwardConfig, LIMoEConfig, MoMEConfig
from moe.routers import TokenChoice
from omnivl.architectures import ALBEF, OmniVL, Unified, VisionConfig
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import LM, MLM, MRM, Answer, UniVLC
from omnivl.parts.sizes import Transformer

CONFIG = OmniVL(
    hidden_size=8,
    num_heads=2,
    vision_layers=1,
    text_layers=1,
    alignment_layers=1,
    generation_layers=1,
    image_size=8,
    video_size=8,
    patch_size=4,
    num_frames=2,
    tubelet_size=2,
    text_length=4,
    vocab_size=20,
    projection_size=4,
)
TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=20, num_reserved=5)
DELTA = "embed.block.visual.patches.video_delta"
POSITIONS = "embed.block.visual.positions"
TIMES = "embed.block.visual.times"
QUEUE = "losses.heads.univlc.queue.visual"
STILL = TokenChoice(renormalise=True).without_noise()


def chain(seed: int, *objectives: object, unified: bool = False, **fields: object) -> Chain:
    torch.manual_seed(seed)
    config = replace(Unified.like(CONFIG) if unified else CONFIG, **fields)  # type: ignore[type-var]
    return build_chain(config, objectives or (MLM(), UniVLC()), TOKENS)  # type: ignore[arg-type]


def weights(of: Chain) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in of.state_dict().items()}


def test_equal_chains_carry_everything() -> None:
    earlier, later = weights(chain(0)), chain(1)
    report = hand_over(later, earlier, "spatial")
    assert (report.created, report.dropped, report.resized, report.source) == ((), (), (), "spatial")
    assert report.inflated == (DELTA,)  # no clip was seen: the 3D kernel is the inflated 2D one still
    assert set(report.carried) == set(earlier) - {DELTA}
    assert all(tensor.equal(earlier[name]) for name, tensor in later.state_dict().items())


def test_heads_are_created_and_dropped() -> None:
    earlier, later = weights(chain(0, MRM())), chain(1, LM())
    fresh = weights(later)
    report = hand_over(later, earlier, "spatial")
    assert report.dropped == ()
    assert report.aside
    assert all(name.startswith("losses.heads.mrm.") for name in report.aside)
    assert report.created
    assert all(name.startswith("losses.vocabulary.") for name in report.created)
    assert all(later.state_dict()[name].equal(fresh[name]) for name in report.created)


def test_heads_wait_aside_for_the_stage_that_has_them_again(tmp_path: Path) -> None:
    first, second, third = weights(chain(0, MLM())), chain(1, MRM()), chain(2, LM())
    report = hand_over(second, first, "spatial")
    save_file(first, tmp_path / "first.safetensors")
    saved = {**weights(second), **heads_aside(second.state_dict().keys(), tmp_path / "first.safetensors")}
    assert {name for name in saved if name.startswith("aside.")} == {f"aside.{name}" for name in report.aside}
    last = hand_over(third, saved, "temporal")
    vocabulary = [name for name in last.carried if name.startswith("losses.vocabulary")]
    assert vocabulary  # MLM and LM share the vocabulary head: it comes back over a stage without it
    assert all(third.state_dict()[name].equal(first[name]) for name in vocabulary)
    assert all(name.startswith("losses.heads.mrm.") for name in last.aside)
    save_file(saved, tmp_path / "second.safetensors")
    assert heads_aside(third.state_dict().keys(), tmp_path / "second.safetensors").keys() == {
        f"aside.{name}" for name in last.aside
    }


def test_new_twins_start_where_their_modules_stand() -> None:
    earlier, later = weights(chain(0)), chain(1, UniVLC(queue_size=6))
    report = hand_over(later, earlier, "spatial")
    own = later.state_dict()
    twins = [name for name in report.created if "momentum_" in name]
    assert any(name.startswith("visual_00.momentum_") for name in twins)
    assert any(name.startswith("contrast.momentum_") for name in twins)
    assert all(own[name].equal(earlier[name.replace("momentum_", "")]) for name in twins)
    assert not own["losses.heads.univlc.queue.valid"].any()


def test_queue_is_carried_whole_or_not_at_all() -> None:
    filled = chain(0, UniVLC(queue_size=6))
    filled.state_dict()["losses.heads.univlc.queue.valid"].fill_(True)
    filled.state_dict()["losses.heads.univlc.queue.pointer"].fill_(5)
    same, smaller = chain(1, UniVLC(queue_size=6)), chain(1, UniVLC(queue_size=4))
    assert QUEUE in hand_over(same, weights(filled), "spatial").carried
    assert same.state_dict()["losses.heads.univlc.queue.valid"].all()
    report = hand_over(smaller, weights(filled), "spatial")
    assert {name for name in report.created if ".queue." in name} == {
        name for name in smaller.state_dict() if ".queue." in name
    }
    assert not smaller.state_dict()["losses.heads.univlc.queue.valid"].any()
    assert int(smaller.state_dict()["losses.heads.univlc.queue.pointer"]) == 0


def test_positions_are_resized() -> None:
    earlier = weights(chain(0))
    earlier[POSITIONS][1:] = 2.0  # a constant table stays constant, whatever the interpolation
    earlier[TIMES] = torch.tensor([[1.0], [3.0]]).expand(2, 8)[: len(earlier[TIMES])]
    later = chain(1, image_size=16, num_frames=8, text_length=6)
    fresh = weights(later)
    report = hand_over(later, earlier, "spatial")
    assert set(report.resized) == {POSITIONS, TIMES, "embed.block.text.positions"}
    own = later.state_dict()
    assert own[POSITIONS].shape == (1 + 16, 8)
    assert own[POSITIONS][0].equal(earlier[POSITIONS][0])
    assert torch.allclose(own[POSITIONS][1:], torch.tensor(2.0))
    assert own["embed.block.text.positions"][:4].equal(earlier["embed.block.text.positions"])
    assert own["embed.block.text.positions"][4:].equal(fresh["embed.block.text.positions"][4:])


def test_relative_positions_are_resized() -> None:
    vision, name = VisionConfig(relative_positions=True), "visual_00.block.relative.bias"
    earlier = weights(chain(0, vision=vision))
    earlier[name][:-3], earlier[name][-3:] = 2.0, torch.arange(3.0)[:, None]
    later = chain(1, vision=vision, image_size=16)
    assert name in hand_over(later, earlier, "spatial").resized
    own = later.state_dict()[name]
    assert len(own) == (2 * 4 - 1) ** 2 + 3  # frames of 4 x 4 patches
    assert torch.allclose(own[:-3], torch.tensor(2.0))
    assert own[-3:].equal(earlier[name][-3:]), "the way to and from the class token has no distance"


def test_video_kernel_keeps_its_sum_over_another_tubelet() -> None:
    earlier = weights(chain(0))
    earlier[DELTA] = torch.randn_like(earlier[DELTA])
    later = chain(1, tubelet_size=4, num_frames=4)
    assert DELTA in hand_over(later, earlier, "spatial").resized
    own = later.state_dict()[DELTA]
    assert own.shape[0] == 4
    torch.testing.assert_close(own.sum(0), earlier[DELTA].sum(0))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        hand_over(chain(1, vocab_size=24), weights(chain(0)), "spatial")
    assert str(caught.value) == (
        "embed.block.text.words: has shape [20, 8] in the earlier stage and [24, 8] in this one; only position tables "
        "and 3D patch kernels can be resized: give both stages the same sizes, or start without init_from"
    )


@pytest.mark.parametrize(
    "ffn",
    [
        MoMEConfig(),
        LIMoEConfig(num_experts=3, every=1, router=STILL),
        LIMoEConfig(num_experts=3, every=1, router=replace(STILL, top_k=2)),
    ],
    ids=["mome", "limoe", "limoe, two"],
)
def test_a_dense_stage_hands_over_to_one_with_experts_without_a_break(ffn: FeedForwardConfig) -> None:
    dense, experts = chain(0), chain(1, ffn=ffn)
    report = hand_over(experts, weights(dense), "spatial")
    assert report.dropped == ()
    assert {name.split(".")[0] for name in report.upcycled} == {"visual_00", "text_00", "alignment_00", "generation_00"}
    assert all("router" in name for name in report.created)
    frames = torch.randint(0, 256, (3, 2, 3, 8, 8), dtype=torch.uint8)
    token_ids = torch.randint(5, 20, (3, 4))
    for before, after in zip(
        (dense.encode_visual(frames), dense.encode_visual(frames[:, :1]), dense.encode_text(token_ids)),
        (experts.encode_visual(frames), experts.encode_visual(frames[:, :1]), experts.encode_text(token_ids)),
        strict=True,
    ):
        torch.testing.assert_close(after, before)


def test_experts_may_stand_in_other_blocks_than_before() -> None:
    depth = {"depth": 2, "unified": True}
    below = chain(0, ffn=LIMoEConfig(num_experts=3, blocks=(0,)), **depth)
    above = chain(1, ffn=LIMoEConfig(num_experts=3, blocks=(-1,)), **depth)
    report = hand_over(above, weights(below), "spatial")
    assert report.dropped == ()
    assert report.created == ("unified_01.block.ffn.router.gate.weight",)
    slots = [getattr(one, layer).block.ffn for layer in ("unified_00", "unified_01") for one in (below, above)]
    bank, merged, dense, copies = slots
    torch.testing.assert_close(merged.fc1.weight, bank.experts.fc1_weight.mean(0))
    torch.testing.assert_close(merged.fc2.weight, bank.experts.fc2_weight.mean(0).t())
    torch.testing.assert_close(copies.experts.fc1_weight, dense.fc1.weight.expand(3, -1, -1))


def test_noise_on_copied_experts_is_the_same_in_every_process_and_in_twins() -> None:
    ffn = LIMoEConfig(num_experts=3, every=1, router=STILL)
    dense = weights(chain(0, UniVLC(queue_size=6)))

    def start(seed: int, build_seed: int, noise: float = 0.0) -> dict[str, Tensor]:
        experts = chain(build_seed, UniVLC(queue_size=6), ffn=ffn)
        stacks = dict.fromkeys(("visual", "text", "alignment", "generation"), noise)
        report = hand_over(experts, dense, "spatial", seed=seed, upcycle_noise=stacks)
        return {name: experts.state_dict()[name] for name in report.upcycled}

    noisy, still = start(7, 1, 0.1), start(7, 1)
    again, other = start(7, 2, 0.1), start(8, 1, 0.1)
    assert noisy.keys() == still.keys()
    for name, tensor in noisy.items():
        assert torch.equal(tensor, again[name]), name
        assert all(torch.equal(one, still[name][0]) for one in still[name]), "copies where no noise is asked for"
        matrix = name.endswith(("fc1_weight", "fc2_weight"))
        assert torch.equal(tensor, still[name]) != matrix, name
        assert torch.equal(tensor, other[name]) != matrix, name
        if matrix:
            assert not torch.equal(tensor[0], tensor[1])
    first, second = (noisy[f"visual_00.block.ffn.experts.fc{layer}_weight"] for layer in (1, 2))
    assert not torch.equal(first - first[0], second - second[0])
    twin = noisy["visual_00.momentum_block.ffn.experts.fc1_weight"]
    assert torch.equal(twin, first), "the dense twin stood where its module stood"


@pytest.mark.parametrize(
    "fields",
    [{"ffn": AttributeConfig(num_experts=3, every=1, noise=0.0, attention=True)}, {"multiway": True}],
    ids=["attributes", "multiway"],
)
def test_plain_projections_hand_over_to_those_by_kind_without_a_break(fields: dict[str, object]) -> None:
    plain, parted = chain(0, unified=True), chain(1, unified=True, **fields)
    report = hand_over(parted, weights(plain), "spatial")
    assert report.dropped == ()
    assert {name.split(".")[-2] for name in report.created} == ({"embed", "norm", "gate"} if "ffn" in fields else set())
    frames, token_ids = torch.randint(0, 256, (3, 1, 3, 8, 8), dtype=torch.uint8), torch.randint(5, 20, (3, 4))
    torch.testing.assert_close(parted.encode_visual(frames), plain.encode_visual(frames))
    torch.testing.assert_close(parted.encode_text(token_ids), plain.encode_text(token_ids))
    back = chain(2, unified=True)
    assert hand_over(back, weights(parted), "joint").dropped == ()
    torch.testing.assert_close(back.encode_text(token_ids), plain.encode_text(token_ids))


def test_table_counts_by_part() -> None:
    table = hand_over(chain(1, LM()), weights(chain(0, MRM())), "spatial").table("title")
    cells = [list(column.cells) for column in table.columns]
    rows = dict(zip(cells[0], zip(*cells[1:], strict=True), strict=True))
    assert rows["losses"][0] == "-"
    # Created: the vocabulary head (transform, norm, decoder). Aside: MRM's, one linear layer. Nothing is dropped.
    assert rows["losses"][5:] == ("6", "2", "-")
    assert rows["embed"][:2] == ("10", "1")


def test_a_stack_that_was_not_there_starts_as_another_one() -> None:
    small = Transformer(hidden_size=16, num_heads=2, layers=2)
    bert = Transformer(hidden_size=16, num_heads=2, layers=2, norm="post")
    sizes = {"image_size": 16, "patch_size": 8, "text_length": 8, "vocab_size": TOKENS.vocab_size, "projection_size": 8}
    config = ALBEF(vision=small, text=bert, fusion=bert, **sizes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    earlier = weights(build_chain(config, (MLM(),), TOKENS))
    torch.manual_seed(1)
    writing = replace(config, generation_layers=2)
    later = build_chain(writing, (MLM(), LM()), TOKENS)
    report = hand_over(later, earlier, "pretrain", starts_from=writing.starts_from)
    own = later.state_dict()
    assert {name.split(".")[0] for name in report.copied} == {"generation_00", "generation_01"}
    for name in report.copied:
        assert own[name].equal(earlier[name.replace("generation", "alignment")]), name
    assert not [name for name in report.created if name.startswith("generation")]
    third = build_chain(writing, (MLM(), LM()), TOKENS)
    again = hand_over(third, weights(later), "two", starts_from=writing.starts_from)
    assert again.copied == ()
    assert {name for name in again.carried if name.startswith("generation")} == set(report.copied)


def test_blocks_of_another_width_are_not_copied() -> None:
    wide = Transformer(hidden_size=24, num_heads=2, layers=1)
    bert = Transformer(hidden_size=16, num_heads=2, layers=1, norm="post")
    sizes = {"image_size": 16, "patch_size": 8, "text_length": 8, "vocab_size": TOKENS.vocab_size, "projection_size": 8}
    config = ALBEF(vision=wide, text=bert, fusion=bert, **sizes)  # type: ignore[arg-type]
    earlier = weights(build_chain(config, (MLM(),), TOKENS))
    writing = replace(config, generation_layers=1)
    later = build_chain(writing, (Answer(),), TOKENS)
    report = hand_over(later, earlier, "pretrain", starts_from=writing.starts_from)
    created = [name for name in report.created if name.startswith("generation")]
    assert {name.partition("cross.")[2] for name in created} == {"kv.weight"}, "the memory's width alone is another one"
    assert "generation_00.block.ffn.fc1.weight" in report.copied
