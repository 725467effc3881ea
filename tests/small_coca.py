"""A small CoCa with open_clip's class of its sizes, and a batch for both."""

import json
from dataclasses import replace

import torch
from peer_open_clip import import_open_clip
from small_clip import TOKENS, make_batch
from small_clip import run as run_step

from omnivl.architectures import CoCa
from omnivl.architectures.build import build_chain
from omnivl.objectives import ITC, LM, PrepareContext
from omnivl.parts.sizes import Transformer

OBJECTIVES = (ITC(temperature=0.07), LM(weight=2.0, label_smoothing=0.0))
STACK = Transformer(hidden_size=12, num_heads=3, layers=2, norm_eps=1e-5)
SMALL = CoCa(
    vision=Transformer(hidden_size=16, num_heads=2, layers=2, norm_eps=1e-5),
    text=STACK,
    multimodal=STACK,
    caption_queries=3,
    pooler_heads=2,
    **{"image_size": 16, "num_frames": 3, "patch_size": 8, "text_length": 8, "vocab_size": 50, "projection_size": 12},
)
RELEASED = replace(SMALL, pooling="joint", alternates=True, closing="released")
"""What open_clip's class is by default."""


def of_one_width(pooling):
    """Where open_clip has two poolers, encoder and decoder are of one width."""
    vision = replace(SMALL.vision, hidden_size=12, num_heads=3)
    return replace(RELEASED, vision=vision, pooling=pooling, closing="own")


def peer(config, quick_gelu=False):
    """open_clip's class with random weights, every one away from its tame start."""
    open_clip = import_open_clip()
    torch.manual_seed(1)
    vision, joint = config.vision, config.pooling == "joint"
    sizes = {"width": 12, "heads": 3, "layers": 2, "context_length": 8, "vocab_size": 50}
    model = open_clip.CoCa(
        embed_dim=12,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=2,
            width=vision.hidden_size,
            head_width=vision.hidden_size // vision.num_heads,
            patch_size=8,
            image_size=16,
            attentional_pool=True if joint else config.pooling,
            attn_pooler_queries=config.caption_queries + joint,
            attn_pooler_heads=2,
            output_tokens=True,
        ),
        text_cfg=open_clip.CLIPTextCfg(**sizes, embed_cls=True, output_tokens=True),
        multimodal_cfg=open_clip.coca_model.MultimodalCfg(**sizes),
        quick_gelu=quick_gelu,
    )
    model.text.correct_cls_mask = config.closing == "own"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "text_decoder.text_projection":  # the class leaves it as it was allocated
                parameter.normal_()
            elif name != "logit_scale":
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def saved(model, config, folder, **pixels):
    """The class's weights as open_clip writes them, with the file that says what it is."""
    vision, joint = config.vision, config.pooling == "joint"
    said = {
        "vision_cfg": {
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_heads,
            "attentional_pool": True if joint else config.pooling,
            "attn_pooler_heads": 2,
        },
        "text_cfg": {"heads": 3, "correct_cls_mask": config.closing == "own"},
        "multimodal_cfg": {"heads": 3},
        "quick_gelu": vision.activation == "quick_gelu",
    }
    text = json.dumps({"model_cfg": said, "preprocess_cfg": pixels})
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder / "open_clip_pytorch_model.bin"


def scattered(config, objectives=OBJECTIVES):
    """A chain with every weight away from its tame start."""
    torch.manual_seed(0)
    chain = build_chain(config, objectives, TOKENS)
    with torch.no_grad():
        for name, parameter in chain.named_parameters():
            if "logit_scale" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return chain


def coca_batch(objectives=OBJECTIVES, kind="image_text", size=4):
    """Pictures and texts, of which the longest fill their rows, and what objectives prepare."""
    batch = make_batch(kind, size)
    context = PrepareContext(0, "test", TOKENS, SMALL.inputs.grid(False), 0)
    prepared = {name: tensor for one in objectives for name, tensor in one.prepare(batch, context).items()}
    return replace(batch, prepared=prepared)


def run(chain, batch, objectives=OBJECTIVES):
    """A training step's forward pass; losses with their weights."""
    weighted = replace(batch, prepared={**batch.prepared, "weight/lm": torch.tensor(2.0)})
    return run_step(chain, objectives, weighted)
