"""A language model of other origin joins weights of an earlier stage, and is kept in bf16 from there on."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

from engine.disk.run_folder import RunFolder
from engine.plan.parse import load_plan
from engine.run.stage_start import start_chain
from engine.step.freeze import freeze, freeze_idle, store_frozen
from engine.telemetry.progress import SilentProgress
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.data.tokenizer import load_tokenizer
from omnivl.parts.opt_names import language_from_opt

PLANS = Path(__file__).parents[4] / "configs" / "plans"
SMALL = [
    "model.vision={hidden_size: 16, num_heads: 2, layers: 1}",
    "model.qformer={hidden_size: 16, num_heads: 2, layers: 1}",
    "model.language.blocks.hidden_size=16",
    "model.language.blocks.num_heads=2",
    "model.language.blocks.layers=2",
    "model.projection_size=8",
    "parallel.precision=fp32",
]


def test_its_weights_are_the_folder_s_and_all_others_the_stage_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "vocab_size": 4096}
    peer = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=16))
    peer.save_pretrained(tmp_path / "opt")
    plan = load_plan(PLANS / "blip2_tiny.yaml", [*SMALL, f"stages.3.weights={{language: {tmp_path / 'opt'}}}"])
    words, captions = plan.stages[2:]
    tokenizer, run = load_tokenizer(plan.tokenizer), RunFolder(tmp_path / "run")
    earlier = build_chain(words.model, words.objectives, tokenizer.special).state_dict()
    source = run.stage(2, "words").weights
    source.parent.mkdir(parents=True)
    save_file(earlier, source)
    chain, origins = start_chain(plan, 3, run, tokenizer, LocalGather(), torch.device("cpu"), SilentProgress())
    given = language_from_opt(peer.state_dict())
    assert origins.foreign == given.keys()
    assert set(origins.earlier) == chain.state_dict().keys() & earlier.keys() - given.keys()
    for name, tensor in chain.state_dict().items():
        assert torch.equal(tensor, given[name] if name in given else earlier[name]), name
    freeze(chain, captions.freeze, "stages.3.freeze")
    freeze_idle(chain, captions.layouts())
    store_frozen(chain, captions.model.stacks)
    assert chain.get_parameter("language_embed.block.words").dtype == torch.bfloat16
    assert chain.get_parameter("prefix.block.weight").requires_grad
