"""ALBEF: parity with transformers' blocks and torchmultimodal's losses, sizes, what it refuses, what it trains."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_towers import SIZES, TOKENS, scattered
from torch import nn
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertModel, ViTConfig, ViTModel

from moe.config import LIMoEConfig, MoMEConfig
from omnivl.architectures import ALBEF
from omnivl.architectures.build import build_chain
from omnivl.architectures.foreign import CLIP_PIXELS
from omnivl.chain.demands import Demands, Join
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import lay_out, plan_layout
from omnivl.chain.positions import prepared_targets
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.errors import ModelError
from omnivl.hub import OmniVLConfig, OmniVLModel
from omnivl.inference.generate import SearchOptions, generate
from omnivl.inference.predict import predict
from omnivl.objectives import ITM, LM, MLM, MRM, VLM, Objective, PrepareContext, UniVLC
from omnivl.parts import attention
from omnivl.parts.losses import Losses
from omnivl.parts.sizes import Transformer
from omnivl.pretrained.load import load_pretrained

NEAR = {"rtol": 2e-5, "atol": 2e-5}
WIDE = Transformer(hidden_size=16, num_heads=2, layers=2, norm_eps=1e-12)
POST = replace(WIDE, norm="post")
SMALL = ALBEF(
    **{"vision": WIDE, "text": POST, "fusion": POST},
    **{"image_size": 16, "patch_size": 8, "text_length": 7, "vocab_size": 50, "projection_size": 8},
)
OBJECTIVES: tuple[Objective, ...] = (
    UniVLC(queue_size=8, batch_keys="momentum", soft_target_alpha=0.4),
    VLM(),
    MLM(probability=0.5, soft_target_alpha=0.4),
)
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])


class Peer(nn.Module):
    """What ALBEF is made of, from transformers: ViT, a BERT, and blocks of a second one with cross-attention."""

    def __init__(self):
        super().__init__()
        sizes = {**SIZES, "vocab_size": 50, "max_position_embeddings": 7, "attn_implementation": "eager"}
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.vision = ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8), add_pooling_layer=False)
        self.text = BertModel(BertConfig(**sizes, **still), add_pooling_layer=False)
        decoder = BertConfig(**sizes, **still, is_decoder=True, add_cross_attention=True, use_cache=False)
        self.fusion = BertModel(decoder, add_pooling_layer=False).encoder
        self.visual_projection, self.text_projection = nn.Linear(16, 8), nn.Linear(16, 8)
        scattered(self)

    def forward(self, pixels, token_ids, mask):
        images = self.vision(pixels).last_hidden_state
        texts = self.text(token_ids, attention_mask=mask).last_hidden_state
        everywhere = torch.where(mask[:, None, None, :] == 1, 0.0, torch.finfo(torch.float32).min)
        everywhere = everywhere.expand(-1, 1, mask.shape[1], -1)
        fused = self.fusion(texts, attention_mask=everywhere, encoder_hidden_states=images).last_hidden_state
        embedded = (
            F.normalize(self.visual_projection(images[:, 0]), dim=-1),
            F.normalize(self.text_projection(texts[:, 0]), dim=-1),
        )
        return images, texts, fused, *embedded

    def named(self, folder, of=lambda parameter: parameter.data):
        """Parameters, or what belongs to each, by the names of ALBEF's released code."""
        found = {}
        values = {name: of(parameter) for name, parameter in self.named_parameters()}
        for part, prefix in (("vision", ""), ("text", "text_encoder.bert."), ("fusion", "")):
            module = getattr(self, part)
            kept = {name: parameter.data.clone() for name, parameter in module.named_parameters()}
            for name, parameter in module.named_parameters():
                value = values[f"{part}.{name}"]
                parameter.data = torch.zeros_like(parameter) if value is None else value.clone()
            if part == "fusion":
                for name, parameter in module.named_parameters():
                    index, _, rest = name.removeprefix("layer.").partition(".")
                    found[f"text_encoder.bert.encoder.layer.{int(index) + 2}.{rest}"] = parameter.data.clone()
            else:
                module.save_pretrained(folder / part)
                saved = load_file(folder / part / "model.safetensors")
                found |= timm(saved) if part == "vision" else {prefix + name: one for name, one in saved.items()}
            for name, parameter in module.named_parameters():
                parameter.data = kept[name]
        for name, part in (("vision_proj", "visual_projection"), ("text_proj", "text_projection")):
            found |= {f"{name}.{end}": values[f"{part}.{end}"] for end in ("weight", "bias")}
        return {name: one.contiguous() for name, one in found.items()}


def timm(saved):
    """The names of timm's ViT, for those of transformers' files."""
    found = {}
    ends = {"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed"}
    parts = {
        **{"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.output.dense": "attn.proj"},
        **{"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"},
    }
    for name, tensor in saved.items():
        name, end = (name, "") if name in ends else name.rsplit(".", 1)
        if name in ends:
            found[ends[name]] = tensor
        elif not name.startswith("encoder."):
            own = {"layernorm": "norm", "embeddings.patch_embeddings.projection": "patch_embed.proj"}[name]
            found[f"{own}.{end}"] = tensor
        elif name.endswith(".query"):
            slots = [saved[f"{name.removesuffix('query')}{slot}.{end}"] for slot in ("query", "key", "value")]
            found[f"blocks.{name.split('.')[2]}.attn.qkv.{end}"] = torch.cat(slots)
        elif not name.endswith((".key", ".value")):
            _, _, index, part = name.split(".", 3)
            found[f"blocks.{index}.{parts[part]}.{end}"] = tensor
    return {f"visual_encoder.{name}": tensor for name, tensor in found.items()}


def inputs_of(side=16):
    frames = torch.randint(0, 256, (2, 1, 3, side, side), dtype=torch.uint8)
    token_ids = torch.where(MASK == 1, torch.randint(5, 50, (2, 7)), TOKENS.pad)
    return frames, token_ids


def as_released(frames):
    """Pixels as the released code normalises them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_PIXELS.mean, CLIP_PIXELS.std))
    return (frames[:, 0].float() / 255.0 - mean) / std


def loaded(peer, folder, objectives=()):
    folder.mkdir(exist_ok=True)
    save_file(peer.named(folder), folder / "model.safetensors")
    chain = build_chain(SMALL, objectives, TOKENS)
    return chain, load_pretrained(chain, SMALL, folder)


def before_losses(chain, frames, token_ids):
    """The state that losses would read of pairs of which every stream is read."""
    reads = frozenset({"visual", "text", "visual_embedding", "text_embedding"})
    layout = lay_out({"all": Demands(joins={"all": Join()}, reads=reads)}, "image_text", 2, 1, "predict")
    state = State({"frames": frames, "token_ids": token_ids}, layout)
    for layer in chain.program:
        state = state if isinstance(layer, Losses) else layer(state)
    return state


def test_streams_and_gradients_equal_transformers(tmp_path):
    torch.manual_seed(0)
    peer = Peer()
    chain, report = loaded(peer, tmp_path / "all")
    assert (report.missing, report.unexpected, report.resized) == (("contrast.logit_scale",), (), {})
    frames, token_ids = inputs_of()
    state, wanted = before_losses(chain, frames, token_ids), peer(as_released(frames), token_ids, MASK)
    places = MASK == 1
    own = (
        state.rows("visual", "clean"),
        state.rows("text", "clean"),
        state.rows("fused", "all"),
        state["visual_embedding"],
        state["text_embedding"],
    )
    read = [
        (one, other) if one.shape[1] != 7 else (one[places], other[places])
        for one, other in zip(own, wanted, strict=True)
    ]
    for one, other in read:
        torch.testing.assert_close(one, other, **NEAR)
    directions = [torch.randn_like(one) for one, _ in read]
    for side in (0, 1):
        sum((pair[side] * direction).sum() for pair, direction in zip(read, directions, strict=True)).backward()
    gradients = SMALL.from_foreign(peer.named(tmp_path, lambda parameter: parameter.grad), tmp_path / "none")
    compared = 0
    for name, parameter in chain.named_parameters():
        if name.startswith("contrast.logit_scale"):
            continue
        compared += 1
        if name.startswith("embed.block.visual.patches"):
            continue  # of other pixels: see below
        if name == "embed.block.text.positions":
            gradients[name] = gradients[name] - peer.text.embeddings.token_type_embeddings.weight.grad[0]
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=2e-4, atol=5e-5, msg=name)
    assert compared == len(list(chain.parameters())) - 1
    # W' = 0.5 W / std and the shift of the bias: the gradient of W is that of W' times 0.5 / std, plus the bias' part.
    mean, std = (torch.tensor(values)[:, None] for values in (CLIP_PIXELS.mean, CLIP_PIXELS.std))
    patches = chain.embed.block.visual.patches
    weight = patches.weight.grad.view(16, 3, -1) * (0.5 / std) + patches.bias.grad[:, None, None] * (0.5 - mean) / std
    theirs = peer.vision.embeddings.patch_embeddings.projection
    torch.testing.assert_close(weight.view_as(theirs.weight), theirs.weight.grad, rtol=2e-4, atol=5e-5)
    torch.testing.assert_close(patches.bias.grad, theirs.bias.grad, rtol=2e-4, atol=5e-5)


def test_fused_blocks_equal_torchmultimodals():
    """Forward and gradient of the stack that fuses."""
    peers = pytest.importorskip(
        "torchmultimodal.models.albef.multimodal_encoder",
        reason="torchmultimodal is not installed: its blocks are compared where it is",
        exc_type=ImportError,
    )
    torch.manual_seed(0)
    chain = scattered(build_chain(SMALL, (), TOKENS))
    peer = peers.ALBEFMultimodalEncoder(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    theirs, pairs = dict(peer.named_parameters()), []
    for index in range(2):
        for ours, parts in OF_TORCHMULTIMODAL.items():
            for end in ("weight", "bias"):
                own = chain.get_parameter(f"alignment_{index:02d}.block.{ours}.{end}")
                found = [theirs[f"layer.{index}.{part}.{end}"] for part in parts]
                for one, value in zip(found, own.detach().chunk(len(found)), strict=True):
                    one.data.copy_(value)
                pairs.append((own, found))
    assert sum(len(found) for _, found in pairs) == len(theirs)
    texts, images, rows = torch.randn(2, 7, 16), torch.randn(3, 5, 16), torch.tensor([2, 0])
    mask, x = MASK == 1, texts
    for layer in (chain.alignment_00, chain.alignment_01):
        x = layer.block(x, mask, images, rows).y
    wanted = peer(texts, MASK, images[rows])
    torch.testing.assert_close(x[mask], wanted[mask], **NEAR)
    direction = torch.randn_like(x[mask])
    (x[mask] * direction).sum().backward()
    (wanted[mask] * direction).sum().backward()
    for own, found in pairs:
        torch.testing.assert_close(own.grad, torch.cat([one.grad for one in found]), rtol=2e-4, atol=5e-5)


OF_TORCHMULTIMODAL = {
    "attention.qkv": ("attention.query", "attention.key", "attention.value"),
    "attention.out": ("attention.output",),
    "norm1": ("attention_layernorm",),
    "cross.q": ("cross_attention.query",),
    "cross.kv": ("cross_attention.key", "cross_attention.value"),
    "cross.out": ("cross_attention.output",),
    "norm2": ("cross_attention_layernorm",),
    "ffn.fc1": ("feedforward.model.0",),
    "ffn.fc2": ("feedforward.model.2",),
    "norm3": ("feedforward_layernorm",),
}


def test_blocks_start_from_vit_and_bert(tmp_path):
    torch.manual_seed(0)
    vit = scattered(ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8), add_pooling_layer=False))
    sizes = {**SIZES, "num_hidden_layers": 4, "vocab_size": 50, "max_position_embeddings": 7}
    bert = scattered(BertForMaskedLM(BertConfig(**sizes))).eval()
    vit.save_pretrained(tmp_path / "vit")
    bert.save_pretrained(tmp_path / "bert")
    chain = build_chain(SMALL, (MLM(),), TOKENS)
    started = {name: parameter.detach().clone() for name, parameter in chain.named_parameters()}
    words = load_pretrained(chain, SMALL, tmp_path / "bert")
    assert words.unexpected == ()
    of_text = {name for name in words.missing if not name.startswith(("visual_", "embed.block.visual", "contrast."))}
    assert of_text == {
        name for name in started if name.startswith("alignment_") and (".cross." in name or ".norm2." in name)
    }
    pictures = load_pretrained(chain, SMALL, tmp_path / "vit", part="vision")
    assert pictures.unexpected == ()
    frames, token_ids = inputs_of()
    state = before_losses(chain, frames, token_ids)
    torch.testing.assert_close(
        state.rows("visual", "clean"), vit(frames[:, 0].float() / 127.5 - 1.0).last_hidden_state, **NEAR
    )
    hidden = bert.bert(token_ids, attention_mask=MASK, output_hidden_states=True).hidden_states
    torch.testing.assert_close(state.rows("text", "clean")[MASK == 1], hidden[2][MASK == 1], **NEAR)
    # BERT's last blocks fuse; the cross-attention, which it lacks, keeps its starting values.
    for layer in (chain.alignment_00, chain.alignment_01):
        assert torch.equal(
            layer.block.attention.out.weight, bert.bert.encoder.layer[2 + layer.level].attention.output.dense.weight
        )
        assert torch.equal(layer.block.norm3.weight, bert.bert.encoder.layer[2 + layer.level].output.LayerNorm.weight)
    scores = chain.losses.vocabulary(hidden[4])
    torch.testing.assert_close(scores, bert.cls(hidden[4]), **NEAR)
    assert torch.equal(started["alignment_00.block.cross.q.weight"], chain.alignment_00.block.cross.q.weight)


def test_heads_of_the_released_code_have_their_places(tmp_path):
    torch.manual_seed(0)
    peer = Peer()
    given = peer.named(tmp_path) | {
        "temp": torch.tensor(0.05),
        "itm_head.weight": torch.randn(2, 16),
        "itm_head.bias": torch.randn(2),
        "text_encoder.cls.predictions.transform.dense.weight": torch.randn(16, 16),
        "text_encoder.cls.predictions.transform.dense.bias": torch.randn(16),
        "text_encoder.cls.predictions.transform.LayerNorm.weight": torch.randn(16),
        "text_encoder.cls.predictions.transform.LayerNorm.bias": torch.randn(16),
        "text_encoder.cls.predictions.bias": torch.randn(50),
        "image_queue": torch.randn(8, 4),
    }
    save_file(given, tmp_path / "model.safetensors")
    chain = build_chain(SMALL, OBJECTIVES, TOKENS)
    report = load_pretrained(chain, SMALL, tmp_path)
    assert (report.missing, report.unexpected) == ((), ("image_queue",))
    assert chain.contrast.scale().item() == pytest.approx(20.0)
    assert torch.equal(chain.losses.heads["vlm"].output.weight, given["itm_head.weight"])
    assert torch.equal(chain.losses.vocabulary.decoder.weight, chain.embed.block.text.words)
    for name, parameter in chain.named_parameters():
        if "momentum_" in name:
            assert torch.equal(parameter, chain.get_parameter(name.replace("momentum_", ""))), name


def test_images_of_another_size_have_their_positions_interpolated(tmp_path):
    torch.manual_seed(0)
    save_file(Peer().named(tmp_path), tmp_path / "model.safetensors")
    model = replace(SMALL, image_size=32)
    report = load_pretrained(build_chain(model, (), TOKENS), model, tmp_path)
    assert report.resized == {"embed.block.visual.positions": "[5, 16] -> [17, 16]"}


@pytest.mark.parametrize(
    ("stack", "option", "kind", "message"),
    [
        ("vision", {"num_heads": 4}, "vit", "model.vision.num_heads: got 4; allowed 2"),
        ("text", {"num_heads": 4}, "bert", "model.text.num_heads: got 4; allowed 2"),
        ("fusion", {"norm": "pre"}, "bert", "model.fusion.norm: got 'pre'; allowed 'post'"),
    ],
)
def test_weights_that_would_be_computed_otherwise_are_refused(tmp_path, stack, option, kind, message):
    config = {"vocab_size": 50, "max_position_embeddings": 7}
    own = (
        ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8))
        if kind == "vit"
        else BertModel(BertConfig(**SIZES, **config))
    )
    own.save_pretrained(tmp_path)
    model = replace(SMALL, **{stack: replace(getattr(SMALL, stack), **option)})
    with pytest.raises(ModelError) as caught:
        load_pretrained(build_chain(model, (), TOKENS), model, tmp_path)
    assert str(caught.value) == f"{tmp_path}: {message} with these weights; set it, or give other weights"


def test_the_published_configuration_has_the_published_size():
    with torch.device("meta"):
        chain = build_chain(ALBEF(), OBJECTIVES, TOKENS)
    student, teacher = (
        {name: p.numel() for name, p in chain.named_parameters() if ("momentum_" in name) is twin}
        for twin in (False, True)
    )

    def count(*beginnings, of=student):
        return sum(number for name, number in of.items() if name.startswith(beginnings))

    assert count("embed.block.visual", "visual_") == 85_844_736  # ViT-B/16 at 256 pixels
    # BERT has 512 positions and two token types, of which one is folded into them; ours has as many as a text.
    tables = (512 - 25) * 768 + 2 * 768
    assert count("embed.block.text", "text_", "alignment_") + tables == 123_075_072
    # The map to the words is the word embedding there, and has a bias of its own.
    tied = 30_522 * 768
    assert count("losses.vocabulary") - tied == 622_650
    assert count("contrast") == 2 * (768 * 256 + 256) + 1
    assert count("losses.heads") == 2 * 768 + 2
    assert sum(student.values()) + tables - tied == 209_937_725
    assert sum(teacher.values()) == sum(student.values()) - (2 * 768 + 2) - 1, "neither the match nor the temperature"
    assert not [
        name for name in student if "temporal" in name or "times" in name or "pooler" in name or "mask_token" in name
    ]


def make_batch(objectives, size=4, kind="image_text"):
    draw = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (size, 1, 3, 16, 16), generator=draw, dtype=torch.uint8)
    token_ids = torch.randint(5, 50, (size, 7), generator=draw)
    token_ids[:, 0], token_ids[:, 4], token_ids[:, 5:] = TOKENS.cls, TOKENS.sep, TOKENS.pad
    own = torch.arange(size)
    batch = Batch(kind, frames, token_ids, own, own, own)
    context = PrepareContext(0, "test", TOKENS, SMALL.inputs.grid(False), 0)
    prepared = {name: tensor for one in objectives for name, tensor in one.prepare(batch, context).items()}
    return replace(batch, prepared=prepared)


FILLINGS = {
    "dense": WIDE.ffn,
    "mome": MoMEConfig(fusion_from=1),
    "limoe": LIMoEConfig(num_experts=4, every=1, implementation="loop"),
}


@pytest.mark.parametrize("ffn", FILLINGS)
@pytest.mark.parametrize(
    "objectives",
    [
        OBJECTIVES,
        (MLM(soft_target_alpha=0.4),),
        (UniVLC(),),
        (UniVLC(), VLM()),
        (MLM(grounded=False), UniVLC()),
        (*OBJECTIVES, LM()),
    ],
)
def test_idle_parameters_are_those_without_a_gradient(objectives, ffn):
    torch.manual_seed(0)
    stacks = {name: replace(getattr(SMALL, name), ffn=FILLINGS[ffn]) for name in ("vision", "text", "fusion")}
    chain = build_chain(replace(SMALL, **stacks, generation_layers=2), objectives, TOKENS)
    layout = plan_layout(objectives, "image_text", 4, 1)
    out = chain(State.from_batch(make_batch(objectives), layout))
    assert out.named("loss").keys() >= {objective.key for objective in objectives}
    out["loss"].backward()
    idle = {id(parameter) for layer in chain.layers for parameter in layer.idle_parameters([layout])}
    for name, parameter in chain.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad is None) == (id(parameter) in idle), name
        else:
            assert parameter.grad is None, name


def test_losses_fall():
    torch.manual_seed(0)
    objectives = (replace(OBJECTIVES[0], queue_size=0), *OBJECTIVES[1:])
    norm = {name: replace(getattr(SMALL, name), norm="pre") for name in ("text", "fusion")}
    chain = build_chain(replace(SMALL, **norm), objectives, TOKENS)
    optimizer = torch.optim.Adam([p for p in chain.parameters() if p.requires_grad], lr=3e-3)
    state = State.from_batch(make_batch(objectives), plan_layout(objectives, "image_text", 4, 1))
    runs = []
    for _ in range(80):
        out = chain(state)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        chain.after_step()
        runs.append({name: loss.item() for name, loss in out.named("loss").items()})
    assert runs[-1]["mlm"] < 0.7 * runs[0]["mlm"]
    assert runs[-1]["vlm"] < 0.7 * runs[0]["vlm"]
    assert runs[-1]["univlc"] < 0.9 * runs[0]["univlc"]


@pytest.mark.parametrize(
    "objectives", [OBJECTIVES, (UniVLC(),), (MLM(soft_target_alpha=0.4),), (UniVLC(), VLM(), LM())]
)
def test_operations_are_what_torch_counts(monkeypatch, objectives):
    from torch.utils.flop_counter import FlopCounterMode

    # torch counts products, but not its fused attention on the CPU.
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    monkeypatch.setattr(MLM, "restored_words", property(lambda self: {self.key: 1 / 7}))
    wide = {name: replace(getattr(SMALL, name), hidden_size=64) for name in ("vision", "text", "fusion")}
    chain = build_chain(replace(SMALL, **wide, projection_size=1, generation_layers=1), objectives, TOKENS)
    batch = make_batch(objectives)
    batch = replace(batch, token_ids=batch.token_ids.masked_fill(batch.token_ids == TOKENS.pad, 9))
    targets = torch.full((4, 7), -100)
    targets[:, 1] = 5  # one of seven positions of each text, which are chosen in whole quarters of the rows
    given = {"mlm/token_ids": batch.token_ids, "lm/token_ids": batch.token_ids}
    given |= prepared_targets("mlm", targets) | prepared_targets("lm", batch.token_ids)
    layout = plan_layout(objectives, "image_text", 4, 1)
    with FlopCounterMode(display=False) as counter:
        chain(State.from_batch(batch, layout).merged(given))["loss"].backward()
    assert counter.get_total_flops() == pytest.approx(chain_flops(chain, layout), rel=5e-3)


@pytest.mark.parametrize(
    ("objective", "stream"),
    [(MRM(), "masked_visual"), (LM(), "generation"), (ITM(), "fused_visual")],
    ids=lambda value: getattr(value, "key", value),
)
def test_objectives_on_streams_that_it_lacks_are_refused(objective, stream):
    with pytest.raises(ModelError) as caught:
        build_chain(SMALL, (objective,), TOKENS)
    assert str(caught.value) == (
        f"objective {objective.key!r} asks for the stream {stream!r}; architecture 'albef' has visual, text, "
        "embedding, fused, momentum_fused; take the objective out or change model.kind"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"image_size": 20}, "model.image_size: got 20; allowed a multiple of patch_size 8; change either"),
        (
            {"vision": {"num_heads": 3}},
            "model.vision.hidden_size: got 16; allowed a multiple of num_heads 3; change either",
        ),
        ({"vision": {"norm": "post"}}, "model.vision.norm: got 'post'; allowed 'pre' in 'albef'; set it to 'pre'"),
        ({"fusion": {"layers": 0}}, "model.fusion.layers: got 0; allowed 1 or more; raise it, e.g. to 12"),
        (
            {"fusion": {"hidden_size": 32}},
            "model.fusion.hidden_size: got 32; allowed text.hidden_size 16; make them equal",
        ),
        (
            {"text": {"mlp_ratio": 0.01}},
            "model.text.mlp_ratio: got 0.01; allowed 1 / hidden_size or more; raise it, e.g. to 4",
        ),
        ({"text": {"drop_path": 0.1}}, "model.text.drop_path: got 0.1; allowed 0; blocks that read texts have none"),
        (
            {"text": {"ffn": LIMoEConfig(blocks=(5,))}},
            "model.text.ffn.blocks: got 5; allowed -2 to 1, the blocks of 2 layers; name another block or build more",
        ),
        (
            {"text": {"activation": "quick_gelu", "ffn": LIMoEConfig(every=1)}},
            "model.text.activation: got 'quick_gelu' with ffn kind 'limoe'; allowed 'gelu' where there are sparse or "
            "attribute experts; set it to 'gelu'",
        ),
        ({"vocab_size": 40}, "model.vocab_size: 40 rows for a tokenizer of 50 words; set it to 50 or more"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_what_does_not_fit_together_is_refused(model, message):
    changed = {
        name: replace(getattr(SMALL, name), **value) if isinstance(value, dict) else value
        for name, value in model.items()
    }
    with pytest.raises(ModelError) as caught:
        build_chain(replace(SMALL, **changed), (), TOKENS)
    assert str(caught.value) == message


def test_images_may_be_wider_than_texts():
    torch.manual_seed(0)
    chain = build_chain(
        replace(SMALL, vision=replace(WIDE, hidden_size=24), generation_layers=1), (*OBJECTIVES, LM()), TOKENS
    )
    out = chain(State.from_batch(make_batch((*OBJECTIVES, LM())), plan_layout((*OBJECTIVES, LM()), "image_text", 4, 1)))
    assert torch.isfinite(out["loss"])


def test_each_text_is_matched_with_the_image_that_it_is_given():
    torch.manual_seed(0)
    chain = scattered(build_chain(SMALL, (UniVLC(), VLM()), TOKENS)).eval()
    frames, token_ids = inputs_of()
    pairs = predict(chain, "vlm", frames, token_ids)
    crossed = predict(chain, "vlm", frames, token_ids.repeat(2, 1), torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(crossed[:2], pairs)
    assert not torch.allclose(crossed[2:], pairs)


def test_its_decoder_writes_with_and_without_a_cache():
    torch.manual_seed(0)
    chain = scattered(build_chain(replace(SMALL, generation_layers=2), (LM(),), TOKENS)).eval()
    frames, _ = inputs_of()
    options = SearchOptions(start=4, end=2, pad=0, banned=(1, 3, 4), max_length=6, num_beams=3)
    cached, uncached = (generate(chain, "lm", frames, options, cached=cached) for cached in (True, False))
    assert torch.equal(cached.token_ids, uncached.token_ids)
    torch.testing.assert_close(cached.log_probability, uncached.log_probability)


def test_an_exported_model_gives_what_the_chain_gives(tmp_path):
    torch.manual_seed(0)
    chain = scattered(build_chain(SMALL, OBJECTIVES, TOKENS)).eval()
    model = OmniVLModel(OmniVLConfig.of(SMALL, OBJECTIVES, TOKENS))
    own = model.chain.state_dict()
    assert not [name for name in own if "momentum_" in name or ".queue." in name]
    model.chain.load_state_dict({name: tensor for name, tensor in chain.state_dict().items() if name in own})
    model.save_pretrained(tmp_path)
    read = AutoModel.from_pretrained(tmp_path)
    frames, token_ids = inputs_of()
    with torch.no_grad():
        images = read.get_image_features(frames[:, 0]).pooler_output
        texts = read.get_text_features(input_ids=token_ids, attention_mask=MASK).pooler_output
        scores = predict(read.chain, "vlm", frames, token_ids)
        torch.testing.assert_close(images, chain.encode_visual(frames), **NEAR)
        torch.testing.assert_close(texts, chain.encode_text(token_ids), **NEAR)
        torch.testing.assert_close(scores, predict(chain, "vlm", frames, token_ids), **NEAR)
