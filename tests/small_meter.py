"""A small METER of three widths, and transformers' modules that compute the same: CLIP's, RoBERTa's, BridgeTower's."""

from dataclasses import replace

import torch
from small_towers import scattered
from torch import nn
from transformers import BertConfig, BridgeTowerConfig, CLIPVisionConfig, CLIPVisionModel, RobertaConfig, RobertaModel
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer

from omnivl.architectures import METER
from omnivl.data.batch import Batch
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import ITM, MLM, Objective, PrepareContext
from omnivl.parts.sizes import Transformer

TOKENS = SpecialTokens(pad=1, cls=0, sep=2, mask=3, decode=4, vocab_size=50, num_reserved=5)
OBJECTIVES: tuple[Objective, ...] = (MLM(probability=0.5), ITM(alignment_weight=0.0))
SMALL = METER(
    vision=Transformer(hidden_size=16, num_heads=2, layers=2, norm_eps=1e-5, activation="quick_gelu"),
    text=Transformer(hidden_size=12, num_heads=3, layers=2, norm="post", norm_eps=1e-5),
    fusion=Transformer(hidden_size=20, num_heads=4, layers=2, norm="post", norm_eps=1e-12),
    **{"image_size": 16, "patch_size": 8, "text_length": 7, "vocab_size": 50},
)
MERGED = replace(SMALL, attention="merged", fusion=replace(SMALL.fusion, layers=3))
LENGTHS = (4, 7, 3, 6)


def meter_batch(objectives=OBJECTIVES, kind="image_text"):
    """Four pictures and texts, of which the longest fills its row, and what objectives prepare."""
    random = torch.Generator().manual_seed(2)
    frames = torch.randint(0, 256, (4, 1, 3, 16, 16), generator=random, dtype=torch.uint8)
    token_ids = torch.randint(5, 50, (4, 7), generator=random)
    for row, length in enumerate(LENGTHS):
        token_ids[row, 0], token_ids[row, length - 1], token_ids[row, length:] = TOKENS.cls, TOKENS.sep, TOKENS.pad
    own = torch.arange(4)
    return prepared(Batch(kind, frames, token_ids, own, own, own), objectives)


def prepared(batch, objectives):
    """A batch with what objectives prepare."""
    context = PrepareContext(0, "test", TOKENS, SMALL.inputs.grid(False), 0)
    made = {name: tensor for one in objectives for name, tensor in one.prepare(batch, context).items()}
    return replace(batch, prepared=made)


def _sizes(stack):
    return {
        "hidden_size": stack.hidden_size,
        "intermediate_size": stack.inner_size,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.num_heads,
        "hidden_act": stack.activation,
        "layer_norm_eps": stack.norm_eps,
    }


_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Peer(nn.Module):
    """METER of transformers' modules, with random weights.

    The image tower has one block more than ours, whose result is not read.
    """

    def __init__(self, config=SMALL):
        super().__init__()
        vision, text, fusion = config.vision, config.text, config.fusion
        eager = {"attn_implementation": "eager"}
        deeper = _sizes(replace(vision, layers=vision.layers + 1))
        self.vision = CLIPVisionModel(CLIPVisionConfig(**deeper, image_size=16, patch_size=8, **eager))
        self.text = RobertaModel(
            RobertaConfig(
                **{**_sizes(text), **_STILL, **eager, "vocab_size": 50, "pad_token_id": 1, "bos_token_id": 0},
                **{"max_position_embeddings": 9, "type_vocab_size": 1},
            ),
            add_pooling_layer=False,
        )
        self.to_visual = nn.Linear(vision.hidden_size, fusion.hidden_size)
        self.to_text = nn.Linear(text.hidden_size, fusion.hidden_size)
        self.types = nn.Parameter(torch.zeros(2, fusion.hidden_size))
        self.merged = config.attention == "merged"
        if self.merged:
            options = BertConfig(**_sizes(fusion), **_STILL, **eager)
            self.both = nn.ModuleList([BertLayer(options) for _ in range(fusion.layers)])
        else:
            options = BridgeTowerConfig(**_sizes(fusion), **_STILL, **eager)
            options.is_decoder, options.add_cross_attention = False, True
            self.of_text = nn.ModuleList([BridgeTowerBertCrossLayer(options) for _ in range(fusion.layers)])
            self.of_visual = nn.ModuleList([BridgeTowerBertCrossLayer(options) for _ in range(fusion.layers)])
        self.pool_text = nn.Linear(fusion.hidden_size, fusion.hidden_size)
        self.pool_visual = nn.Linear(fusion.hidden_size, fusion.hidden_size)
        scattered(self)

    def forward(self, frames, token_ids):
        """The fusion's text and image positions, and the pooled rows."""
        present = (token_ids != TOKENS.pad).long()
        states = self.vision(pixel_values=frames[:, 0] / 127.5 - 1, output_hidden_states=True).hidden_states[-2]
        tower = getattr(self.vision, "vision_model", self.vision)
        visual = self.to_visual(tower.post_layernorm(states)) + self.types[1]
        text = self.to_text(self.text(token_ids, attention_mask=present).last_hidden_state) + self.types[0]
        hidden = (1.0 - present[:, None, None].float()) * torch.finfo(torch.float32).min
        length = text.shape[1]
        if self.merged:
            x = torch.cat([text, visual], dim=1)
            hidden = torch.cat([hidden, hidden.new_zeros(len(x), 1, 1, visual.shape[1])], dim=-1)
            for layer in self.both:
                x = _first(layer(x, attention_mask=hidden))
            text, visual = x[:, :length], x[:, length:]
        else:
            shown = hidden.new_zeros(len(text), 1, 1, visual.shape[1])
            for one, other in zip(self.of_text, self.of_visual, strict=True):
                made = one(text, visual, attention_mask=hidden, encoder_attention_mask=shown)
                visual = _first(other(visual, text, attention_mask=shown, encoder_attention_mask=hidden))
                text = _first(made)
        pooled = [torch.tanh(self.pool_text(text[:, 0])), torch.tanh(self.pool_visual(visual[:, 0]))]
        return text, visual, torch.cat(pooled, dim=-1)

    def of_fusion(self, tensors):
        """Tensors of the fusion, by the names of parameters here, by the chain's names."""
        found = {"encoded.block.types": tensors["types"]}
        pairs = {"encoded.block.projections.visual": "to_visual", "encoded.block.projections.text": "to_text"}
        pairs |= {"fused_pool.block.text": "pool_text", "fused_pool.block.visual": "pool_visual"}
        sides = {"both": ""} if self.merged else {"of_text": ".text", "of_visual": ".visual"}
        joint = {own: (name,) for own, name in pairs.items()}
        for side, place in sides.items():
            for index in range(len(getattr(self, side))):
                for own, names in (_MERGED if self.merged else _CROSS).items():
                    joint[f"fused_{index:02d}.block{place}.{own}"] = tuple(f"{side}.{index}.{name}" for name in names)
        for own, names in joint.items():
            for end in ("weight", "bias"):
                found[f"{own}.{end}"] = torch.cat([tensors[f"{name}.{end}"] for name in names])
        return found


def _first(made):
    return made[0] if isinstance(made, tuple) else made


_SELF = {
    "attention.qkv": tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
    "attention.out": ("attention.output.dense",),
    "norm1": ("attention.output.LayerNorm",),
    "ffn.fc1": ("intermediate.dense",),
    "ffn.fc2": ("output.dense",),
}
_MERGED = _SELF | {"norm2": ("output.LayerNorm",)}
_CROSS = _SELF | {
    "cross.q": ("crossattention.self.query",),
    "cross.kv": ("crossattention.self.key", "crossattention.self.value"),
    "cross.out": ("crossattention.output.dense",),
    "norm2": ("crossattention.output.LayerNorm",),
    "norm3": ("output.LayerNorm",),
}
