"""Flamingo: its parts against IDEFICS and plain torch, what tokens see, and a start as the bare language model."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_flamingo import FLAMINGO, INTERLEAVED, KEPT, READERS, documents
from small_language import TOKENS
from small_towers import scattered
from torch import nn
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from engine.step.freeze import freeze, freeze_idle
from omnivl.architectures.base import missing_streams
from omnivl.architectures.build import build_chain
from omnivl.data.documents import END_TOKEN, PICTURE_TOKEN, read_document
from omnivl.errors import DataError, ModelError
from omnivl.objectives import InterleavedLM, PrefixLM
from omnivl.parts.gated import GatedBlock, see_pictures
from omnivl.parts.resampler import AttentionHeads, PerceiverResampler, Resampler

NEAR = {"rtol": 2e-5, "atol": 2e-5}


def equal_gradients(pairs):
    for name, own, theirs in pairs:
        torch.testing.assert_close(own, theirs, rtol=2e-4, atol=2e-5, msg=name)


def test_the_resampler_is_that_of_idefics():
    torch.manual_seed(0)
    width = SimpleNamespace(embed_dim=16)
    config = SimpleNamespace(perceiver_config=SimpleNamespace(qk_layer_norms_perceiver=False), vision_config=width)
    theirs = scattered(IdeficsPerceiverResampler(config, 16, 2, 2, 4, 3))
    own = PerceiverResampler(16, Resampler(num_heads=2, head_size=4, latents=3, layers=2, activation="relu"))
    names = {"latents": ["latents"], "norm.weight": ["layer_norm.weight"], "norm.bias": ["layer_norm.bias"]}
    for index in range(2):
        ours, attention, mlp = f"blocks.{index}", f"blocks.{index}.0", f"blocks.{index}.1"
        for ending in ("weight", "bias"):
            names[f"{ours}.norm_memory.{ending}"] = [f"{attention}.context_layer_norm.{ending}"]
            names[f"{ours}.attention.norm.{ending}"] = [f"{attention}.latents_layer_norm.{ending}"]
            names[f"{ours}.ffn.norm.{ending}"] = [f"{mlp}.ln.{ending}"]
        names[f"{ours}.attention.q.weight"] = [f"{attention}.q_proj.weight"]
        names[f"{ours}.attention.kv.weight"] = [f"{attention}.{part}_proj.weight" for part in "kv"]
        names[f"{ours}.attention.out.weight"] = [f"{attention}.output_proj.weight"]
        names[f"{ours}.ffn.fc1.weight"] = [f"{mlp}.fc.weight"]
        names[f"{ours}.ffn.fc2.weight"] = [f"{mlp}.c_proj.weight"]
    given = dict(theirs.named_parameters())
    assert sorted(one for parts in names.values() for one in parts) == sorted(given)
    own.load_state_dict({name: torch.cat([given[part].data for part in parts]) for name, parts in names.items()})
    x = torch.randn(3, 5, 16)
    found, wanted = own(x[:, None]), theirs(x)
    torch.testing.assert_close(found, wanted, **NEAR)
    weight = torch.randn_like(found)
    for one in (found, wanted):
        (one * weight).sum().backward()
    gradients = {name: torch.cat([given[part].grad for part in parts]) for name, parts in names.items()}
    equal_gradients((name, one.grad, gradients[name]) for name, one in own.named_parameters())


def test_frames_have_embeddings_and_a_picture_that_of_the_first():
    torch.manual_seed(0)
    own = PerceiverResampler(16, Resampler(num_heads=2, head_size=4, latents=3, layers=1), frames=3)
    bare = PerceiverResampler(16, Resampler(num_heads=2, head_size=4, latents=3, layers=1))
    bare.load_state_dict({name: one for name, one in own.state_dict().items() if name != "times"})
    clip = torch.randn(2, 3, 5, 16)
    torch.testing.assert_close(own(clip), bare(clip + own.times[:, None]))
    torch.testing.assert_close(own(clip[:, :1]), bare(clip[:, :1] + own.times[0]))


class PlainGated(nn.Module):
    """OpenFlamingo's gated block in torch's own modules, of one sample at a time, its mask made by comparing times."""

    def __init__(self, size, memory_size, heads, head_size):
        super().__init__()
        self.heads, inner = heads, heads * head_size
        self.norm, self.ff_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.to_q, self.to_out = nn.Linear(size, inner, bias=False), nn.Linear(inner, size, bias=False)
        self.to_kv = nn.Linear(memory_size, 2 * inner, bias=False)
        self.up, self.down = nn.Linear(size, 4 * size, bias=False), nn.Linear(4 * size, size, bias=False)
        self.attn_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x, media, text_time):
        number, queries, _ = media.shape
        q, (k, v) = self.to_q(self.norm(x)), self.to_kv(media.flatten(0, 1)).chunk(2, dim=-1)
        media_time = torch.arange(1, number + 1).repeat_interleave(queries)
        rows = []
        for place in range(len(x)):
            one = []
            for head in range(self.heads):
                size = q.shape[1] // self.heads
                own = slice(head * size, (head + 1) * size)
                scores = k[:, own] @ q[place, own] * size**-0.5
                scores = scores.masked_fill(media_time != text_time[place], -torch.finfo(scores.dtype).max)
                shares = scores.softmax(0)
                one.append((shares if text_time[place] else torch.zeros_like(shares)) @ v[:, own])
            rows.append(torch.cat(one))
        x = x + self.to_out(torch.stack(rows)) * self.attn_gate.tanh()
        return x + self.down(F.gelu(self.up(self.ff_norm(x)))) * self.ff_gate.tanh()


def test_a_gated_block_is_that_of_open_flamingo():
    torch.manual_seed(0)
    theirs, own = scattered(PlainGated(12, 16, 2, 4)), GatedBlock(12, 16, AttentionHeads(num_heads=2, head_size=4))
    names = {
        **{f"attention.norm.{ending}": f"norm.{ending}" for ending in ("weight", "bias")},
        **{f"ffn.norm.{ending}": f"ff_norm.{ending}" for ending in ("weight", "bias")},
        **{"attention.q.weight": "to_q.weight", "attention.kv.weight": "to_kv.weight"},
        **{"attention.out.weight": "to_out.weight", "ffn.fc1.weight": "up.weight", "ffn.fc2.weight": "down.weight"},
        **{"attention_gate": "attn_gate", "ffn_gate": "ff_gate"},
    }
    given = dict(theirs.named_parameters())
    assert sorted(names.values()) == sorted(given)
    own.load_state_dict({name: given[other].data for name, other in names.items()})
    x, media, times = torch.randn(2, 6, 12), torch.randn(2, 2, 3, 16), torch.tensor([[0, 1, 1, 2, 2, 2]] * 2)
    found = own(x, media.flatten(1, 2), None, see_pictures(times, 2, 3, every=False))
    wanted = torch.stack([theirs(*one) for one in zip(x, media, times, strict=True)])
    torch.testing.assert_close(found, wanted, **NEAR)
    weight = torch.randn_like(found)
    for one in (found, wanted):
        (one * weight).sum().backward()
    equal_gradients((name, one.grad, given[names[name]].grad) for name, one in own.named_parameters())


def test_what_a_token_sees():
    sees = see_pictures(torch.tensor([[0, 1, 2]]), 2, 2, every=False)
    assert sees.int().tolist() == [[[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]]
    sees = see_pictures(torch.tensor([[0, 1, 2]]), 2, 2, every=True)
    assert sees.int().tolist() == [[[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]]


def test_a_document_and_what_is_said_in_it():
    reader = READERS["language"]
    a, b, c = reader.words("abc")
    found = read_document("a<image>b<EOC>c<image>a<EOC>", reader)
    assert found.ids.tolist() == [TOKENS.cls, a, PICTURE_TOKEN, b, END_TOKEN, c, PICTURE_TOKEN, a, END_TOKEN]
    assert found.pictures.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert found.said.astype(int).tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("text", "pictures", "kind"),
    [("<image>ab<EOC>", 2, "images_text"), ("<image>a<image>b<EOC>", 1, "image_text"), ("<image>ab", 0, "text")],
)
def test_a_text_with_another_number_of_marks_is_refused(text, pictures, kind):
    marks = text.count("<image>")
    message = (
        f"objective interleaved_lm: entry 'pages', sample 0: got a text with {marks} <image> marks and {pictures} "
        "pictures; allowed is a mark for each picture, in their order; name another field as text, or other pictures"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        documents((text,), max(pictures, 1), kind=kind)


@pytest.mark.parametrize("kind", ["image_text", "images_text"])
def test_a_text_of_one_picture_needs_no_marks(kind):
    state, other = documents(("ab",), 1, kind=kind), documents(("<image>ab<EOC>",), 1, kind=kind)
    assert state["interleaved_lm/token_ids"][0, [1, 4]].tolist() == [PICTURE_TOKEN, END_TOKEN]
    for name in ("token_ids", "targets", "pictures"):
        assert torch.equal(state[f"interleaved_lm/{name}"], other[f"interleaved_lm/{name}"])


def test_texts_alone_are_learnt_whole():
    torch.manual_seed(0)
    chain, state = scattered(build_chain(FLAMINGO, (INTERLEAVED,), TOKENS)), documents(("ab", "c"), 1, kind="text")
    a, b, c = READERS["language"].words("abc")
    targets = state["interleaved_lm/targets"]
    assert targets[0, :4].tolist() == [a, b, END_TOKEN, -100] and targets[1, :3].tolist() == [c, END_TOKEN, -100]
    freeze_idle(chain, [state.layout])
    chain(state)["loss"].backward()
    stacks = {
        name.partition(".")[0].partition("_")[0] for name, one in chain.named_parameters() if one.grad is not None
    }
    assert stacks == {"language"}


def logits_of(chain, state):
    for name, _ in chain.passes:
        if name == "losses":
            return state["logits/interleaved_lm"]
        state = chain.named_layers[name](state)
    raise AssertionError("no losses")


def test_with_closed_gates_the_language_model_is_alone_to_the_bit():
    torch.manual_seed(0)
    chain = build_chain(FLAMINGO, (INTERLEAVED,), TOKENS)
    for name, one in chain.named_parameters():
        if not name.endswith("_gate"):
            one.data.add_(torch.randn_like(one) * 0.2)
    alone, state = documents(), documents()
    for name, _ in chain.passes:
        if name.partition("_")[0] == "language":
            alone = chain.named_layers[name](alone)
    found = logits_of(chain, state)
    assert found.shape[1] == FLAMINGO.language.vocab_size + 2
    assert torch.equal(found, alone["logits/interleaved_lm"])
    chain.get_parameter("gated_01.block.attention_gate").data.fill_(0.1)
    assert not torch.equal(logits_of(chain, state), found)


def test_words_see_the_pictures_before_them():
    torch.manual_seed(0)
    chain = scattered(build_chain(FLAMINGO, (INTERLEAVED,), TOKENS))
    every = build_chain(replace(FLAMINGO, sees="all"), (INTERLEAVED,), TOKENS)
    every.load_state_dict(chain.state_dict())
    state = documents(("<image>abc<EOC>x<image>cde<EOC>",))
    said = state["interleaved_lm/targets"][0] != -100
    chosen = torch.arange(len(said))[said]
    state = state.merged({"interleaved_lm/chosen": chosen})
    second = state["interleaved_lm/pictures"][0][chosen] == 2
    for picture in (0, 1):
        frames = state["frames"].clone()
        frames[:, picture] = 255 - frames[:, picture]
        moved = (logits_of(chain, state.updated(frames=frames)) - logits_of(chain, state)).abs().amax(1) > 1e-6
        # The first picture reaches later words through the words that looked at it, too.
        assert torch.equal(moved, second if picture else torch.ones_like(second))
    differs = (logits_of(every, state) - logits_of(chain, state)).abs().amax(1) > 1e-6
    assert torch.equal(differs, second), "the words behind the second picture may look at the first, too"


def test_only_resampler_gates_and_the_added_words_are_trained():
    torch.manual_seed(0)
    chain, state = scattered(build_chain(FLAMINGO, (INTERLEAVED,), TOKENS)), documents()
    freeze(chain, KEPT, "freeze")
    freeze_idle(chain, [state.layout])
    chain(state)["loss"].backward()
    trained = {name for name, one in chain.named_parameters() if one.grad is not None}
    assert {name.partition(".")[0].partition("_")[0] for name in trained} == {"resampler", "gated", "language"}
    assert {name for name in trained if name.startswith("language")} == {"language_embed.block.added"}
    assert all(chain.get_parameter(name).grad.abs().sum() > 0 for name in trained)


def test_the_loss_is_the_mean_over_said_words_by_hand():
    torch.manual_seed(0)
    chain, state = scattered(build_chain(FLAMINGO, (INTERLEAVED,), TOKENS)).eval(), documents()
    loss = chain(state)["loss"]
    every = torch.arange(state["interleaved_lm/targets"].numel())
    logits = logits_of(chain, state.merged({"interleaved_lm/chosen": every})).log_softmax(-1)
    reader, total, number = READERS["language"], 0.0, 0
    for row, text in enumerate(("<image>ab<EOC>xy<image>cd<EOC>", "k<image>e<image>fgh<EOC>")):
        document = read_document(text, reader)
        for place in document.said.nonzero()[0].tolist():
            column = int(document.ids[place]) % (FLAMINGO.language.vocab_size + 2)
            total, number = total - logits[row * reader.length + place - 1, column], number + 1
    torch.testing.assert_close(loss, total / number)


@pytest.mark.parametrize(
    ("width", "layers", "every", "billions"), [(2048, 24, 1, 1.158), (4096, 40, 4, 1.573), (8192, 12, 1, 6.92)]
)
def test_gated_layers_have_the_sizes_of_the_paper(width, layers, every, billions):
    with torch.device("meta"):
        block = GatedBlock(width, 1536, AttentionHeads())
    count = sum(one.numel() for one in block.parameters()) * (layers // every)
    assert count / 1e9 == pytest.approx(billions, abs=0.005)


def test_the_resampler_has_the_size_of_the_paper():
    with torch.device("meta"):
        resampler = PerceiverResampler(1536, Resampler())
    matrices = sum(one.numel() for name, one in resampler.named_parameters() if one.dim() == 2 and name != "latents")
    assert matrices / 1e6 == pytest.approx(188.7, abs=0.05)


def test_objectives_of_other_readers_are_told_apart():
    assert missing_streams(FLAMINGO, INTERLEAVED) == []
    assert missing_streams(FLAMINGO, PrefixLM()) == ["queries"]
    with pytest.raises(ModelError, match=r"model\.gated_every: got 5; allowed 1 to 4"):
        build_chain(replace(FLAMINGO, gated_every=5), (InterleavedLM(),), TOKENS)
