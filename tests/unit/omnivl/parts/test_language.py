"""The language model: parity with transformers' OPT, its rows, what decoding keeps, what is kept in bf16."""

from dataclasses import replace

import pytest
import torch
from small_language import QUERIES, TOKENS, LetterTokenizer, Writer
from small_towers import scattered
from transformers import OPTConfig, OPTForCausalLM

from engine.step.freeze import freeze, freeze_idle, store_frozen
from moe.config import MoMEConfig
from omnivl.architectures.build import build_chain
from omnivl.architectures.misfits import language_misfits
from omnivl.chain.backward import FORWARD_AND_BACKWARD
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import plan_layout
from omnivl.chain.positions import IGNORED, prepared_targets
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.data.tokenizer import load_readers
from omnivl.errors import ModelError, UserError
from omnivl.inference.generate import SearchOptions, beam_search, generate, writing_search
from omnivl.objectives import PrefixLM, PrepareContext
from omnivl.parts import attention
from omnivl.parts.language import LanguageModel, Prefix, language_layers, language_order
from omnivl.parts.opt_names import language_from_opt, refuse_options_of_opt
from omnivl.parts.sizes import Transformer
from omnivl.pretrained.load import load_pretrained

SMALL = Writer()
OBJECTIVE = PrefixLM()
KEY = OBJECTIVE.key
CAPTIONS = ("abc", "hello you", "z", "")
READERS = load_readers(SMALL.text_inputs, LetterTokenizer())
NEAR = {"rtol": 2e-5, "atol": 2e-5}


def peer_of(**changed):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "ffn_dim": 64, "num_attention_heads": 2}
    config = {"vocab_size": 40, "max_position_embeddings": 20, "dropout": 0.0, "word_embed_proj_dim": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return scattered(OPTForCausalLM(OPTConfig(**{**sizes, **config, **ids, **changed})))


def chain_of(peer=None, model=SMALL, objectives=(OBJECTIVE,), dtype=torch.float32):
    chain = build_chain(model, objectives, TOKENS, compute_dtype=dtype)
    if peer is not None:
        own = dict(chain.named_parameters())
        given = language_from_opt(peer.state_dict())
        assert given.keys() == {name for name in own if name.startswith("language_")}
        for name, tensor in given.items():
            own[name].data.copy_(tensor)
    return chain


def state_of(kind="image_text", objective=OBJECTIVE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (4, 1, 3, 8, 8), dtype=torch.uint8, generator=generator)
    own = torch.arange(4)
    batch = Batch(kind, None if kind == "text" else frames, own[:, None], own, own, own, captions=CAPTIONS)
    prepared = objective.prepare(batch, PrepareContext(0, "test", TOKENS, (2, 2), 0, readers=READERS))
    return State.from_batch(replace(batch, prepared=prepared), plan_layout((objective,), kind, 4, 1))


def through(chain, state, until):
    """The state before a layer."""
    for name, layer in zip(chain.passes, chain.program, strict=True):
        if name == until:
            return state
        state = layer(state)
    raise AssertionError(until)


@pytest.mark.parametrize("kind", ["image_text", "text"])
def test_losses_and_gradients_equal_transformers(kind):
    torch.manual_seed(0)
    peer = peer_of()
    chain, state = chain_of(peer), state_of(kind)
    prefix = through(chain, state, ("language_embed", 0)).get("prefix", torch.zeros(4, 0, 16)).detach()
    prefix.requires_grad_()
    embedded = torch.cat([prefix, peer.get_input_embeddings()(state[f"{KEY}/token_ids"])], dim=1)
    mask = torch.cat([torch.ones(4, prefix.shape[1]), state[f"{KEY}/mask"]], dim=1).long()
    labels = torch.full(mask.shape, IGNORED)
    labels[:, prefix.shape[1] + 1 :] = state[f"{KEY}/targets"][:, :-1]
    theirs = peer(inputs_embeds=embedded, attention_mask=mask, labels=labels).loss
    theirs.backward()
    given: list[torch.Tensor] = []

    def keep(layer, inputs, made):
        if "prefix" in made:
            made["prefix"].retain_grad()
            given.append(made["prefix"])

    chain.prefix.register_forward_hook(keep)
    own = chain(state)["loss"]
    own.backward()
    torch.testing.assert_close(own, theirs, **NEAR)
    wanted = language_from_opt({name: one.grad for name, one in peer.named_parameters()})
    for name, parameter in chain.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], **NEAR, msg=name)
    if kind == "text":
        assert chain.prefix.block.weight.grad is None
    else:
        torch.testing.assert_close(given[0].grad, prefix.grad, **NEAR)


def test_hidden_states_equal_transformers_at_every_token():
    torch.manual_seed(0)
    peer = peer_of().eval()
    chain, state = chain_of(peer), state_of()
    mask = torch.cat([torch.ones(4, QUERIES), state[f"{KEY}/mask"]], dim=1).long()
    before = through(chain, state, ("language_embed", 0))
    embedded = torch.cat([before["prefix"], peer.get_input_embeddings()(state[f"{KEY}/token_ids"])], dim=1)
    wanted = peer.model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
    own = through(chain, state, ("language_embed", 1))["language"]
    torch.testing.assert_close(own[mask.bool()], wanted[mask.bool()], **NEAR)


def test_no_position_sees_what_comes_behind_it_and_all_see_the_queries():
    torch.manual_seed(0)
    chain, state = chain_of(), state_of()
    ids = f"{KEY}/token_ids"
    changed = state[ids].clone()
    changed[1, 4] = 20
    own, other = (
        through(chain, one, ("language_embed", 1))["language"][1] for one in (state, state.merged({ids: changed}))
    )
    assert torch.equal(own[: QUERIES + 4], other[: QUERIES + 4])
    assert not torch.isclose(own[QUERIES + 4 :], other[QUERIES + 4 :]).all(-1).any()
    seen = through(chain, state.merged({"frames": 255 - state["frames"]}), ("language_embed", 1))["language"][1]
    assert not torch.isclose(own, seen).all(-1).any()


def test_what_is_given_and_what_is_predicted():
    state = state_of()
    _, start, end = TOKENS.pad, TOKENS.cls, 5
    hello = [6 + ord(letter) % 34 for letter in "hello "]  # cut to the length of 8 with the start and the end
    assert state[f"{KEY}/token_ids"][1].tolist() == [start, *hello, end]
    assert state[f"{KEY}/targets"][1].tolist() == [*hello, end, IGNORED]
    assert state[f"{KEY}/targets"][3].tolist() == [end, *[IGNORED] * 7]
    assert state[f"{KEY}/mask"].sum(1).tolist() == [5, 8, 3, 2]


def test_a_prompt_is_given_not_predicted():
    objective = PrefixLM(prompt="xy", end=None)
    state = state_of(objective=objective)
    x, y, blank, a = (6 + ord(letter) % 34 for letter in "xy a")
    assert state[f"{KEY}/token_ids"][0, :5].tolist() == [TOKENS.cls, x, y, blank, a]
    assert state[f"{KEY}/targets"][0, :4].tolist() == [IGNORED, IGNORED, blank, a]
    assert state[f"{KEY}/targets"][3].tolist() == [IGNORED, IGNORED, blank, TOKENS.sep, *[IGNORED] * 4]
    writing = objective.writing(READERS["language"], READERS)
    assert (writing.given, writing.end, writing.max_length) == ((TOKENS.cls, x, y), TOKENS.sep, 5)


def test_an_end_of_several_tokens_is_refused():
    with pytest.raises(UserError) as caught:
        state_of(objective=PrefixLM(end="ab"))
    assert str(caught.value) == (
        "objective prefix_lm: end: got 'ab', which is 2 tokens of the language model's tokenizer; allowed is a text of "
        "one token, or null for the tokenizer's own end; change it"
    )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prompt", ["", "xy"])
def test_captions_with_and_without_a_cache_are_those_of_whole_rows(beams, prompt):
    torch.manual_seed(0)
    objective = PrefixLM(prompt=prompt)
    chain = chain_of(peer_of(), objectives=(objective,)).eval()
    frames = state_of()["frames"]
    writing = objective.writing(READERS["language"], READERS)
    options = writing_search(writing, beams)
    cached, whole = (generate(chain, KEY, frames, options, cached=kept) for kept in (True, False))
    assert torch.equal(cached.token_ids, whole.token_ids)
    torch.testing.assert_close(cached.log_probability, whole.log_probability, **NEAR)

    def slowly(token_ids, parents):
        rows = torch.arange(4).repeat_interleave(beams)
        layout = plan_layout((objective,), "image_text", 4 * beams, 1)
        targets = torch.full_like(token_ids, IGNORED)
        targets[:, -1] = 0
        given = {"frames": frames[rows], f"{KEY}/token_ids": token_ids, f"{KEY}/targets": targets}
        return through(chain, State(given, layout), ("losses", 0))[f"logits/{KEY}"][: len(rows)]

    with torch.no_grad():
        wanted = beam_search(slowly, 4, options, frames.device)
    assert torch.equal(cached.token_ids, wanted.token_ids)


def test_a_start_that_is_the_end_as_well_does_not_end_a_text():
    def always(token_ids, parents):
        return torch.tensor([[0.0, 0.0, 9.0 * (token_ids.shape[1] > 1), 5.0]]).expand(len(token_ids), 4)

    options = SearchOptions(start=2, end=2, pad=0, banned=(), max_length=3)
    assert beam_search(always, 1, options, torch.device("cpu")).token_ids.tolist() == [[3, 2, 0]]


def test_a_folder_of_opt_fills_the_language_model(tmp_path):
    torch.manual_seed(0)
    peer = peer_of()
    peer.save_pretrained(tmp_path)
    chain = chain_of()
    report = load_pretrained(chain, SMALL, tmp_path, part="language")
    assert (report.missing, report.unexpected) == ((), ())
    assert torch.equal(chain.language_embed.block.words, peer.model.decoder.embed_tokens.weight)
    assert len(report.matched) == 2 + 3 * 12 + 2


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_attention_heads": 4}, "model.language.blocks.num_heads: got 2; allowed 4 with these weights"),
        ({"do_layer_norm_before": False}, "model.language.blocks.norm: got 'pre'; allowed 'post' with these weights"),
        ({"hidden_size": 16, "word_embed_proj_dim": 8}, "words of width 8 in a model of width 16"),
    ],
)
def test_another_opt_is_refused(tmp_path, said, message):
    with pytest.raises(ModelError, match=message):
        refuse_options_of_opt(said, SMALL.language, tmp_path)


def test_published_sizes():
    sizes = {125: LanguageModel(), 2700: LanguageModel(Transformer(2560, 32, 32, activation="relu", norm_eps=1e-5))}
    for millions, language in sizes.items():
        assert list(language_misfits(language, 32)) == []
        with torch.device("meta"):
            prefix = Prefix(768, 32, language.blocks.hidden_size)
            layers = dict(language_layers(language, prefix, torch.float32))
        counted = sum(one.numel() for name, layer in layers.items() if name != "prefix" for one in layer.parameters())
        assert counted == {125: 125_239_296, 2700: 2_651_596_800}[millions]
    names = ["embed", *layers, "losses"]
    assert language_order(names)[-3:] == ["language_31", "language_embed", "losses"]


@pytest.mark.parametrize("kind", ["image_text", "text"])
def test_what_rests_gets_no_gradient_and_the_rest_gets_some(kind):
    chain, state = chain_of(), state_of(kind)
    idle = {id(one) for layer in chain.layers for one in layer.idle_parameters([state.layout])}
    chain(state)["loss"].backward()
    missing = {id(parameter) for parameter in chain.parameters() if parameter.grad is None}
    own = {id(one) for one in chain.embed.parameters()}  # the test's own layer
    assert missing - own == idle - own
    assert bool(idle) == (kind == "text")


def test_operations_are_those_that_torch_counts(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    chain, state = chain_of(), state_of()
    full = torch.full((4, 8), 7)
    given = {f"{KEY}/token_ids": full, f"{KEY}/mask": torch.ones(4, 8).bool()}
    state = state.merged(given | prepared_targets(KEY, full))
    with FlopCounterMode(display=False) as counter:
        chain(state)["loss"].backward()
    embed = 4 * QUERIES * 2 * 48 * 12 * (FORWARD_AND_BACKWARD - 1)  # the test's own layer, which counts nothing
    assert counter.get_total_flops() == chain_flops(chain, state.layout) + embed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_matrices_are_kept_in_bf16(dtype):
    torch.manual_seed(0)
    blocks = replace(SMALL.language.blocks, frozen_dtype="bf16")
    model = replace(SMALL, language=replace(SMALL.language, blocks=blocks))
    peer = peer_of()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(parameter.bfloat16())
    chain, plain = chain_of(peer, model, dtype=dtype), chain_of(peer, dtype=dtype)
    plain.prefix.load_state_dict(chain.prefix.state_dict())
    plain.embed.load_state_dict(chain.embed.state_dict())
    state = state_of()
    assert store_frozen(chain, model.stacks) == {}
    freeze(chain, ["language_*"], "freeze")
    freeze_idle(chain, [state.layout])
    kept = store_frozen(chain, model.stacks)
    assert kept == {"language": sum(p.numel() for p in peer.parameters() if p.dim() > 1)}
    for name, parameter in chain.named_parameters():
        halved = name.startswith("language_") and parameter.dim() > 1
        assert parameter.dtype == (torch.bfloat16 if halved else torch.float32), name
    losses = [one(state)["loss"] for one in (chain, plain)]
    torch.testing.assert_close(*losses)  # its values are exact in bf16
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(chain.prefix.block.weight.grad, plain.prefix.block.weight.grad)
    assert chain.language_embed.block.words.grad is None


def test_bf16_computes_near_fp32():
    torch.manual_seed(0)
    peer = peer_of()
    low = chain_of(peer, dtype=torch.bfloat16)
    high = chain_of(peer)
    high.prefix.load_state_dict(low.prefix.state_dict())
    high.embed.load_state_dict(low.embed.state_dict())
    torch.testing.assert_close(low(state_of())["loss"], high(state_of())["loss"], rtol=3e-2, atol=0)


def test_misfits_are_named():
    language = LanguageModel(Transformer(10, 3, 0, norm="post", ffn=MoMEConfig()), positions=8, length=6)
    assert [str(one) for one in language_misfits(language, 4)] == [
        "language.blocks.hidden_size: got 10; allowed a multiple of num_heads 3; change either",
        "language.blocks.layers: got 0; allowed 1 or more; raise it, e.g. to 12",
        "language.blocks.norm: got 'post'; allowed 'pre' in a language model; set it to 'pre'",
        "language.blocks.ffn.kind: got 'mome'; allowed 'dense' in a language model; set it to 'dense'",
        "language.positions: got 8; allowed 10 or more: 4 queries and 6 tokens; raise it, or lower language.length",
    ]
