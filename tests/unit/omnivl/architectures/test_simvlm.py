"""SimVLM: losses and gradients against torch's own modules, writing, sizes, what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_clip import TOKENS
from small_simvlm import OBJECTIVES, SMALL, Peer, as_ours, run, scattered, simvlm_batch

from omnivl.architectures import SimVLM
from omnivl.architectures.base import check
from omnivl.architectures.build import build_chain
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import plan_layout
from omnivl.errors import ModelError
from omnivl.inference.generate import caption_search, generate
from omnivl.objectives import ITC, LM
from omnivl.objectives.lm import shift
from omnivl.parts import attention
from omnivl.parts.conv_stem import ConvEmbedding
from omnivl.parts.sizes import MomentumConfig


def peer():
    torch.manual_seed(1)
    model = Peer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def test_loss_and_gradients_are_those_of_torch_s_modules():
    """The encoder reads the words before the image tokens here and behind them there: attention has no order."""
    model, chain, batch = peer(), scattered(), simvlm_batch()
    parameters = dict(chain.named_parameters())
    weights = as_ours(dict(model.named_parameters()))
    assert weights.keys() == parameters.keys()
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
    prepared = batch.prepared
    logits = model(batch.frames, prepared["split_lm/beginning/token_ids"], prepared["split_lm/token_ids"])
    wanted = F.cross_entropy(logits.flatten(0, 1), prepared["split_lm/targets"].flatten(), ignore_index=-100)
    got = run(chain, batch)["loss"]
    torch.testing.assert_close(got, wanted)
    got.backward()
    wanted.backward()
    for name, gradient in as_ours({name: one.grad for name, one in model.named_parameters()}).items():
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-3, atol=2e-5, msg=name)


def test_captions_written_with_and_without_a_cache_are_the_same():
    chain, batch = scattered().eval(), simvlm_batch()
    options = caption_search(TOKENS, 6, 2)
    beginning = torch.tensor([[TOKENS.cls, 7, 8, TOKENS.sep, 0, 0, 0, 0]] * 4)
    made = [
        generate(chain, "split_lm", batch.frames, options, token_ids=beginning, cached=cached)
        for cached in (True, False)
    ]
    torch.testing.assert_close(made[0].token_ids, made[1].token_ids)
    torch.testing.assert_close(made[0].log_probability, made[1].log_probability)


def test_greedy_words_are_the_likeliest_of_torch_s_modules():
    model, chain, batch = peer().eval(), scattered().eval(), simvlm_batch()
    with torch.no_grad():
        for name, tensor in as_ours(dict(model.named_parameters())).items():
            chain.get_parameter(name).copy_(tensor)
        beginning = torch.tensor([[TOKENS.cls, 7, 8, TOKENS.sep, 0, 0, 0, 0]] * 4)
        made = generate(chain, "split_lm", batch.frames, caption_search(TOKENS, 6), token_ids=beginning).token_ids
        for row in range(4):
            words = torch.zeros(1, 8, dtype=torch.int64)
            words[0, 0] = TOKENS.decode
            for step in range(6):
                scores = model(batch.frames[row : row + 1], beginning[:1], words)[0, step]
                scores[: TOKENS.num_reserved] = float("-inf")
                assert made[row, step] == scores.argmax()
                if made[row, step] == TOKENS.sep:
                    break
                words[0, step + 1] = made[row, step]


def test_operations_are_what_torch_counts(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    # torch counts products, but not its fused attention on the CPU.
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    chain, batch = scattered(), simvlm_batch()
    whole = torch.tensor([[1, *range(5, 11), 49]] * 4)
    inputs, targets = shift(whole, TOKENS)  # nothing is padded, neither beginnings nor ends
    prepared = {"split_lm/beginning/token_ids": whole, "split_lm/token_ids": inputs, "split_lm/targets": targets}
    with FlopCounterMode(display=False) as counter:
        run(chain, replace(batch, prepared=prepared))["loss"].backward()
    counted = chain_flops(chain, plan_layout(OBJECTIVES, "image_text", 4, 1), 4 * 8)
    assert counter.get_total_flops() == pytest.approx(counted, rel=3e-3)


def test_all_parameters_learn():
    chain, batch = scattered(), simvlm_batch()
    run(chain, batch)["loss"].backward()
    layout = plan_layout(OBJECTIVES, "image_text", 4, 1)
    assert not [one for layer in chain.layers for one in layer.idle_parameters([layout])]
    assert all(one.grad is not None for one in chain.parameters())


def test_sizes_of_the_blocks():
    """32 blocks of 1,280: 629.7 M in the encoder and 839.1 M in the decoder, which the survey's row does not have."""
    with torch.device("meta"):
        chain = build_chain(SimVLM.presets["huge"], OBJECTIVES, TOKENS)
    sizes = {name: sum(one.numel() for one in layer.parameters()) for name, layer in chain.named_layers.items()}
    encoder = sum(size for name, size in sizes.items() if name.startswith("fused_") and name != "fused_norm")
    decoder = sum(size for name, size in sizes.items() if name.startswith("generation"))
    assert encoder == pytest.approx(629e6, rel=0.002)
    assert decoder == pytest.approx(839e6, rel=0.002)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 40}, "model.image_size: got 40; allowed a multiple of the stem's stride 16; change either"),
        (
            {"decoder": replace(SMALL.decoder, hidden_size=24)},
            "model.decoder.hidden_size: got 24; allowed encoder.hidden_size 12; make them equal",
        ),
        (
            {"stem_blocks": (1, 0, 1)},
            "model.stem_blocks: got [1, 0, 1]; allowed 1 or more in each stage; raise them, e.g. to [3, 4, 23]",
        ),
        (
            {"sizes": "native"},
            "model.sizes: got 'native'; allowed 'fixed' or 'stretched' in 'simvlm'; set it to 'fixed'",
        ),
        (
            {"momentum": MomentumConfig()},
            "model.momentum: got momentum twins; allowed null in 'simvlm', which has none; set it to null",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ModelError) as caught:
        check(replace(SMALL, **change))
    assert str(caught.value) == message


def test_what_looks_at_images_alone_is_refused():
    with pytest.raises(
        ModelError, match="asks for the stream 'embedding'; architecture 'simvlm' has fused, generation"
    ):
        build_chain(SMALL, (ITC(),), TOKENS)
    objectives = (LM(),)
    with pytest.raises(ModelError, match="architecture 'simvlm': got 'lm', whose decoder looks at images"):
        run(scattered(objectives=objectives), simvlm_batch(objectives), objectives)


def test_convolutions_refuse_clips():
    embedding = ConvEmbedding(4, (1,), (1, 1), 8)
    with pytest.raises(ModelError) as caught:
        embedding(torch.zeros(2, 3, 3, 16, 16, dtype=torch.uint8), torch.float32)
    assert str(caught.value) == (
        "images by convolutions: got samples of 3 frames or pictures; allowed is one image; "
        "change the kind of the data entry to 'image_text', or model.kind"
    )
