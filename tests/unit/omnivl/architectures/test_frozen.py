"""Frozen: a prefix that an encoder gives to transformers' OPT as embeddings, and texts that are written behind it."""

import torch
from small_flamingo import FROZEN, PREFIX, caption_batch
from small_language import TOKENS, LetterTokenizer
from small_towers import scattered
from transformers import OPTConfig, OPTForCausalLM

from engine.step.freeze import freeze, freeze_idle
from omnivl.architectures.build import build_chain
from omnivl.chain.layout import plan_layout
from omnivl.chain.positions import IGNORED
from omnivl.chain.state import State
from omnivl.data.tokenizer import load_readers
from omnivl.inference.generate import generate, writing_search
from omnivl.pretrained.load import load_pretrained

READERS = load_readers(FROZEN.text_inputs, LetterTokenizer())
NEAR = {"rtol": 2e-5, "atol": 2e-5}


def state_of():
    return State.from_batch(caption_batch(), plan_layout((PREFIX,), "image_text", 2, 1))


def test_losses_and_gradients_equal_those_of_transformers_behind_the_prefix(tmp_path):
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "ffn_dim": 96, "num_attention_heads": 2, "vocab_size": 40}
    config = OPTConfig(**sizes, **ids, max_position_embeddings=24, dropout=0.0, word_embed_proj_dim=24)
    theirs = scattered(OPTForCausalLM(config))
    theirs.save_pretrained(tmp_path)
    chain = scattered(build_chain(FROZEN, (PREFIX,), TOKENS))
    report = load_pretrained(chain, FROZEN, tmp_path, part="language")
    assert (report.missing, report.unexpected) == ((), ())
    freeze(chain, ["language_*"], "freeze")
    state = state_of()
    freeze_idle(chain, [state.layout])
    own = chain(state)["loss"]
    own.backward()
    trained = {name: one for name, one in chain.named_parameters() if one.grad is not None}
    assert {name.partition("_")[0].partition(".")[0] for name in trained} == {"embed", "visual", "prefix"}
    found = {name: one.grad.clone() for name, one in trained.items()}
    chain.zero_grad()

    encoded = state
    for name, _ in chain.passes[: [name for name, _ in chain.passes].index("prefix") + 1]:
        encoded = chain.named_layers[name](encoded)
    words, mask, targets = (state[f"prefix_lm/{name}"] for name in ("token_ids", "mask", "targets"))
    labels = torch.full((2, FROZEN.prefix + words.shape[1]), IGNORED)
    labels[:, FROZEN.prefix + 1 :] = targets[:, :-1]
    embedded = torch.cat([encoded["prefix"], theirs.get_input_embeddings()(words)], dim=1)
    whole = torch.cat([torch.ones(2, FROZEN.prefix, dtype=torch.long), mask.long()], dim=1)
    wanted = theirs(inputs_embeds=embedded, attention_mask=whole, labels=labels).loss
    torch.testing.assert_close(own, wanted, **NEAR)
    wanted.backward()
    for name, one in trained.items():
        torch.testing.assert_close(found[name], one.grad, rtol=2e-4, atol=3e-5, msg=name)


def test_captions_with_a_cache_are_those_without():
    torch.manual_seed(0)
    chain = scattered(build_chain(FROZEN, (PREFIX,), TOKENS)).eval()
    options = writing_search(PREFIX.writing(READERS["language"], READERS), 2)
    frames = state_of()["frames"]
    cached, whole = (generate(chain, "prefix_lm", frames, options, cached=kept) for kept in (True, False))
    assert torch.equal(cached.token_ids, whole.token_ids)
    torch.testing.assert_close(cached.log_probability, whole.log_probability, **NEAR)
    other = generate(chain, "prefix_lm", frames.flip(0), options)
    torch.testing.assert_close(cached.log_probability, other.log_probability.flip(0), **NEAR)
    assert not torch.isclose(cached.log_probability[0], cached.log_probability[1])
