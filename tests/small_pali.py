"""A small PaLI, transformers' encoder-decoder of its sizes, and a batch for both."""

from dataclasses import replace

import torch
from small_clip import TOKENS, make_batch
from small_clip import run as run_step
from torch import nn

from omnivl.architectures import PaLI
from omnivl.architectures.build import build_chain
from omnivl.architectures.t5_names import names
from omnivl.objectives import PrepareContext, SplitLM
from omnivl.parts.sizes import Transformer

OBJECTIVES = (SplitLM(),)
STACK = Transformer(hidden_size=12, num_heads=2, layers=2, mlp_ratio=2.0)
SMALL = PaLI(
    vision=Transformer(hidden_size=8, num_heads=2, layers=2),
    encoder=STACK,
    decoder=replace(STACK, layers=3),
    head_size=5,
    **{"image_size": 32, "patch_size": 8, "text_length": 8, "vocab_size": 50},
)


def scattered(config=SMALL, objectives=OBJECTIVES):
    """A chain with every weight away from its tame start."""
    torch.manual_seed(0)
    chain = build_chain(config, objectives, TOKENS)
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return chain


def pali_batch(objectives=OBJECTIVES, size=4):
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


def peer(cls="MT5", **options):
    """transformers' class with random weights, in training mode without dropout."""
    import transformers

    config = getattr(transformers, f"{cls}Config")(
        vocab_size=50,
        d_model=12,
        d_kv=5,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        **{"pad_token_id": TOKENS.pad, "decoder_start_token_id": TOKENS.decode, "eos_token_id": TOKENS.sep},
        **options,
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{cls}ForConditionalGeneration")(config)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # the class ties it
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def as_ours(tensors):
    """Tensors of the class by the chain's names."""
    return {ours: torch.cat([tensors[one] for one in parts]) for ours, parts in names(2, 3)}


def tell(chain, model):
    """Copies the class's weights into a chain."""
    with torch.no_grad():
        for name, tensor in as_ours(dict(model.named_parameters())).items():
            chain.get_parameter(name).copy_(tensor)
