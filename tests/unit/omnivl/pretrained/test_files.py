"""Weight files as training codes write them, and damaged ones."""

import argparse
import json
import os
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from small_clip import SMALL, theirs
from small_clip import TOKENS as SMALL_TOKENS
from small_towers import CONFIG, SIZES, TOKENS, scattered
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from omnivl.architectures.build import build_chain
from omnivl.errors import ModelError
from omnivl.pretrained.files import read_weights
from omnivl.pretrained.load import load_pretrained

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(2, dtype=torch.float16)}


def same(found, wanted=WEIGHTS):
    assert found.keys() == wanted.keys()
    return all(found[name].dtype == torch.float32 and torch.equal(found[name], wanted[name]) for name in wanted)


def with_prefix(prefix, weights=WEIGHTS):
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        OrderedDict(WEIGHTS),
        {"model": WEIGHTS},
        {"state_dict": WEIGHTS},
        {"model_state_dict": WEIGHTS},
        {"module": WEIGHTS, "global_steps": 3},
        {"model": {"module": WEIGHTS}},
        {"model": WEIGHTS, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "epoch": 7, "config": {"lr": 1e-4}},
        {"state_dict": WEIGHTS, "hyper_parameters": {"depth": 2}, "callbacks": {}, "epoch": torch.tensor(3.0)},
        {"model": WEIGHTS, "model_ema": with_prefix("x")},
        {"model": WEIGHTS, "args": argparse.Namespace(lr=1e-4)},
        with_prefix("module."),
        with_prefix("_orig_mod."),
        with_prefix("module._orig_mod."),
        {"epoch": 3, "name": "x", "state_dict": with_prefix("module.")},
        {**WEIGHTS, "epoch": 3, "best": 0.5, "name": "x", "none": None, "steps": torch.tensor(4)},
        {**WEIGHTS, 7: torch.ones(2)},
    ],
    ids=lambda content: ",".join(map(str, content))[:40],
)
def test_forms_of_files(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    assert same(read_weights(tmp_path / "file.pth"))


def test_a_number_with_a_place_of_its_own_stays(tmp_path):
    """CLIP's temperature is a tensor without dimensions, beside names with DistributedDataParallel's prefix."""
    torch.save({**with_prefix("module."), "module.logit_scale": torch.tensor(2.0)}, tmp_path / "file.pt")
    assert same(read_weights(tmp_path / "file.pt"), {**WEIGHTS, "logit_scale": torch.tensor(2.0)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"teacher": WEIGHTS, "student": WEIGHTS},
            "got tensors under 'teacher', 'student'; allowed is one of 'model',",
        ),
        ({"model": WEIGHTS, "state_dict": WEIGHTS}, "got tensors under 'model', 'state_dict'; allowed is one of"),
        ({"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "got tensors under 'optimizer'; allowed is one of"),
        ({"epoch": 3}, "got a file without weights; allowed are tensors by their names"),
        ({}, "got a file without weights"),
        (torch.ones(3), "got a Tensor; allowed are tensors by their names; save the model's state_dict by itself"),
        ([WEIGHTS], "got a list; allowed are tensors by their names"),
        (3, "got a int; allowed are tensors by their names"),
        (
            torch.nn.Linear(2, 2),
            r"not readable as weights \(it holds a torch.nn.modules.linear.Linear, an object of Python's rather than a "
            r"tensor, which is not loaded\); fetch it again, or save its mapping of tensors by itself$",
        ),
    ],
)
def test_files_that_do_not_say_what_the_weights_are(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ModelError, match=f"file.pth.*: {message}"):
        read_weights(tmp_path / "file.pth")


@pytest.mark.parametrize(("content", "message"), [(b"", "it is empty"), (b"\xff" * 300, "no file of torch.save: .*")])
def test_files_that_are_none_of_torch(tmp_path, content, message):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(ModelError, match=rf"file.pth: not readable as weights \({message}\); fetch it again"):
        read_weights(tmp_path / "file.pth")


def write_shards(folder):
    save_file({"a.weight": WEIGHTS["a.weight"]}, folder / "one.safetensors")
    save_file({"b.bias": WEIGHTS["b.bias"], "ids": torch.arange(3)}, folder / "two.safetensors")
    return {"a.weight": "one.safetensors", "b.bias": "two.safetensors", "ids": "two.safetensors"}


def test_shards_with_an_index(tmp_path):
    places = write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert same(read_weights(tmp_path))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "got no index of weight files"),
        ("{", "got no index of weight files"),
        ("[]", "got no index of weight files"),
        ("{}", "got no index of weight files .KeyError: 'weight_map'"),
        ('{"weight_map": []}', "got no index of weight files"),
        ('{"weight_map": null}', "got no index of weight files"),
        ('{"weight_map": {"a.weight": 3}}', "got no index of weight files"),
        ("[" * 100_000, "got no index of weight files"),
        (
            '{"weight_map": {"a.weight": "../one.safetensors"}}',
            r"got '\.\./one\.safetensors'; allowed are files beside",
        ),
        ('{"weight_map": {"a.weight": "/etc/passwd"}}', "got '/etc/passwd'; allowed are files beside it"),
        (
            '{"weight_map": {"a.weight": "three.safetensors"}}',
            r"three\.safetensors: got what is no plain file, or is not",
        ),
        ('{"weight_map": {"a.weight": ""}}', "got ''; allowed are files beside it"),
        (
            '{"weight_map": {"a.weight": "one.safetensors", "c": "one.safetensors"}}',
            r"got 'c' \(1 in all\), which one\.safetensors does not hold",
        ),
        (
            '{"weight_map": {"a.weight": "two.safetensors"}}',
            r"got 'a\.weight' \(1 in all\), which two\.safetensors does",
        ),
    ],
)
def test_broken_indexes(tmp_path, index, message):
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=message):
        read_weights(tmp_path)


def test_devices_and_pipes(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="got what is no plain file"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with pytest.raises(ModelError, match="got no index of weight files"):
        read_weights(tmp_path)


def bert(folder, **sizes):
    config = BertConfig(**{**SIZES, "vocab_size": 50, "max_position_embeddings": 6, **sizes})
    scattered(BertModel(config)).save_pretrained(folder)
    return folder


def test_what_a_checkpoint_lacks_is_reported(tmp_path):
    bert(tmp_path, num_hidden_layers=1, vocab_size=40, max_position_embeddings=4)
    report = load_pretrained(build_chain(CONFIG, (), TOKENS), CONFIG, tmp_path)
    assert sorted(report.fresh) == [
        "rows 4 to 5 of embed.block.text.positions, of which the checkpoint has 4",
        "rows 40 to 49 of embed.block.text.words, of which the checkpoint has 40",
        "text blocks 1 of 2, of which the checkpoint has 1",
    ]
    for line in report.fresh:
        assert f"  keeps its starting values: {line}" in report.lines()


def test_a_whole_checkpoint_leaves_nothing(tmp_path):
    assert load_pretrained(build_chain(CONFIG, (), TOKENS), CONFIG, bert(tmp_path)).fresh == ()


def test_blocks_count_where_a_checkpoint_has_none_of_them(tmp_path):
    weights = {name: one for name, one in read_weights(bert(tmp_path)).items() if "layer." not in name}
    save_file(weights, tmp_path / "model.safetensors")
    report = load_pretrained(build_chain(CONFIG, (), TOKENS), CONFIG, tmp_path)
    assert {"text_00.block.norm1.weight", "text_01.block.norm1.weight"} <= set(report.missing)
    assert "text blocks 0 to 1 of 2, of which the checkpoint has 0" in report.fresh


def test_values_that_are_not_finite(tmp_path):
    weights = read_weights(bert(tmp_path))
    weights["embeddings.word_embeddings.weight"][3, 2] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"embed\.block\.text\.words has values that are not finite"):
        load_pretrained(build_chain(CONFIG, (), TOKENS), CONFIG, tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", '{"model_type": "bert", "num_attention_heads": null}'])
def test_broken_configurations(tmp_path, content):
    bert(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError):
        load_pretrained(build_chain(CONFIG, (), TOKENS), CONFIG, tmp_path)


def test_blocks_that_another_architecture_finds_missing(tmp_path):
    """Of CLIP, whose weights are read by the architecture itself."""
    theirs("gelu").save_pretrained(tmp_path)
    weights = {name: one for name, one in read_weights(tmp_path).items() if ".layers.0." not in name}
    save_file(weights, tmp_path / "model.safetensors")
    report = load_pretrained(build_chain(SMALL, (), SMALL_TOKENS), SMALL, tmp_path)
    blocks = {stack: tower.layers for stack, tower in SMALL.stacks.items()}
    assert list(report.fresh) == [
        f"{one} blocks 0 of {n}, of which the checkpoint has {n - 1}" for one, n in blocks.items()
    ]


PEERS = {
    "bert": (CONFIG, lambda: BertModel(BertConfig(**SIZES, vocab_size=50, max_position_embeddings=6))),
    "vit": (CONFIG, lambda: ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8))),
    "clip": (SMALL, lambda: theirs("gelu")),
}


@pytest.mark.parametrize("kind", PEERS)
def test_a_tensor_that_is_missing_or_misshaped_is_one_clear_error_or_reported(tmp_path, kind):
    """Each tensor is left out, cut by a row, flattened, emptied and given a dimension in turn."""
    model, make = PEERS[kind]
    make().save_pretrained(tmp_path)
    whole = read_weights(tmp_path)
    chain = build_chain(model, (), SMALL_TOKENS if kind == "clip" else TOKENS)
    first = load_pretrained(chain, model, tmp_path)
    outcomes = set()
    for name, tensor in whole.items():
        rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
        for change in (None, rows[:-1], rows.flatten(), rows[:0], rows[None]):
            damaged = {**whole, name: change} if change is not None else {k: v for k, v in whole.items() if k != name}
            damaged = {k: v.contiguous().clone() for k, v in damaged.items()}
            save_file(damaged, tmp_path / "model.safetensors")
            try:
                report = load_pretrained(chain, model, tmp_path)
            except ModelError as error:
                outcomes.add("refused" if str(tmp_path) in str(error) else f"without a path: {error}")
                continue
            if change is None and name not in first.unexpected:
                assert set(report.missing) > set(first.missing) or set(report.differences) > set(first.differences), (
                    name
                )
                outcomes.add("reported")
    assert outcomes == {"refused", "reported"}
