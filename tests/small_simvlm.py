"""A small SimVLM with torch's own modules of its sizes, and a batch for both."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from small_clip import TOKENS, make_batch
from small_clip import run as run_step
from torch import nn

from omnivl.architectures import SimVLM
from omnivl.architectures.build import build_chain
from omnivl.objectives import PrepareContext, SplitLM
from omnivl.parts.sizes import Transformer

OBJECTIVES = (SplitLM(),)
STACK = Transformer(hidden_size=12, num_heads=3, layers=2)
SMALL = SimVLM(
    encoder=STACK,
    decoder=STACK,
    stem_width=4,
    stem_blocks=(1, 2, 1),
    **{"image_size": 32, "text_length": 8, "vocab_size": 50},
)


def scattered(config=SMALL, objectives=OBJECTIVES):
    """A chain with every weight away from its tame start."""
    torch.manual_seed(0)
    chain = build_chain(config, objectives, TOKENS)
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return chain


def simvlm_batch(objectives=OBJECTIVES, size=4):
    """Images of 32 pixels and texts, of which the longest fill their rows, and what objectives prepare."""
    random = torch.Generator().manual_seed(3)
    frames = torch.randint(0, 256, (size, 1, 3, 32, 32), generator=random, dtype=torch.uint8)
    batch = replace(make_batch("image_text", size), frames=frames)
    context = PrepareContext(0, "test", TOKENS, SMALL.inputs.grid(False), 0)
    prepared = {name: tensor for one in objectives for name, tensor in one.prepare(batch, context).items()}
    return replace(batch, prepared=prepared)


def run(chain, batch, objectives=OBJECTIVES):
    """A training step's forward pass."""
    return run_step(chain, objectives, batch)


def norms(channels):
    return nn.GroupNorm({4: 4, 8: 8, 16: 16, 32: 32, 64: 32}[channels], channels)


class Block(nn.Module):
    """A bottleneck of torch's modules."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), norms(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), norms(width)
        self.conv3, self.norm3 = nn.Conv2d(width, 4 * width, 1, bias=False), norms(4 * width)
        self.shortcut = self.norm_shortcut = None
        if inputs != 4 * width or stride != 1:
            self.shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.norm_shortcut = norms(4 * width)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm3(self.conv3(F.relu(self.norm2(self.conv2(y)))))
        return F.relu(y + (x if self.shortcut is None else self.norm_shortcut(self.shortcut(x))))


class Peer(nn.Module):
    """SimVLM of torch's convolutions and transformer layers; the names of its parameters are those of the chain."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.GroupNorm(4, 4)
        self.blocks = nn.ModuleList([Block(4, 4, 1), Block(16, 8, 2), Block(32, 8, 1), Block(32, 16, 2)])
        self.linear = nn.Linear(64, 12)
        self.positions = nn.Parameter(torch.zeros(4, 12))
        self.words, self.places = nn.Embedding(50, 12), nn.Parameter(torch.zeros(8, 12))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.encoder = nn.ModuleList(
            [nn.TransformerEncoderLayer(12, 3, 48, layer_norm_eps=1e-6, **options) for _ in "12"]
        )
        self.decoder = nn.ModuleList(
            [nn.TransformerDecoderLayer(12, 3, 48, layer_norm_eps=1e-6, **options) for _ in "12"]
        )
        self.encoded, self.decoded = nn.LayerNorm(12, 1e-6), nn.LayerNorm(12, 1e-6)
        self.output = nn.Linear(12, 50, bias=False)

    def forward(self, frames, beginning, written):
        """Logits at each position of ``written``; the encoder reads the image, then the beginning."""
        x = F.max_pool2d(F.relu(self.norm(self.stem(frames[:, 0] / 127.5 - 1))), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        image = self.linear(x.flatten(2).transpose(1, 2)) + self.positions
        memory = torch.cat([image, self.words(beginning) + self.places], dim=1)
        hidden = torch.cat([torch.zeros(len(image), 4, dtype=torch.bool), beginning == TOKENS.pad], dim=1)
        for layer in self.encoder:
            memory = layer(memory, src_key_padding_mask=hidden)
        memory, text = self.encoded(memory), self.words(written) + self.places
        later = torch.ones(8, 8, dtype=torch.bool).triu(1)
        for layer in self.decoder:
            text = layer(text, memory, tgt_mask=later, memory_key_padding_mask=hidden)
        return self.output(self.decoded(text))


_STEM = {"stem.weight", "norm.weight", "norm.bias", "linear.weight", "linear.bias", "positions"}


def own_name(name):
    """The chain's name of a parameter of ``Peer``; keys and values of cross-attention are apart from queries there."""
    if name in _STEM or name.startswith("blocks."):
        return f"embed.block.visual.{name}"
    if name in ("words.weight", "places"):
        return {"words.weight": "embed.block.text.words", "places": "embed.block.text.positions"}[name]
    if name == "output.weight":
        return "losses.vocabulary.decoder.weight"
    stack, _, rest = name.partition(".")
    if stack in ("encoded", "decoded"):
        return f"fused_norm.block.{rest}" if stack == "encoded" else f"generation_01.block.norm_out.{rest}"
    index, _, part = rest.partition(".")
    inner, _, ending = part.rpartition(".")
    if stack == "encoder":
        if inner == "self_attn":
            return f"fused_0{index}.block.qkv.shared.{ending.removeprefix('in_proj_')}"
        own = {"self_attn.out_proj": "out.shared", "norm1": "norm1.shared", "norm2": "norm2.shared"}
        own |= {"linear1": "ffn.fc1", "linear2": "ffn.fc2"}
        return f"fused_0{index}.block.{own[inner]}.{ending}"
    if inner == "self_attn":
        return f"generation_0{index}.block.attention.qkv.{ending.removeprefix('in_proj_')}"
    own = {"self_attn.out_proj": "attention.out", "multihead_attn.out_proj": "cross.out", "linear1": "ffn.fc1"}
    own |= {"linear2": "ffn.fc2", "norm1": "norm1", "norm2": "norm2", "norm3": "norm3"}
    return f"generation_0{index}.block.{own[inner]}.{ending}"


def as_ours(tensors):
    """Tensors of ``Peer`` by the chain's names."""
    found = {}
    for name, tensor in tensors.items():
        if ".multihead_attn.in_proj_" in name:
            index, ending = name.split(".")[1], name.rpartition("in_proj_")[2]
            start = f"generation_0{index}.block.cross"
            found |= {f"{start}.q.{ending}": tensor[:12], f"{start}.kv.{ending}": tensor[12:]}
        else:
            found[own_name(name)] = tensor
    return found
