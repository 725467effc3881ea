"""``omnivl.load`` and ``omnivl.train``: the values of the commands, and sentences for what cannot be used."""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import patience
import pytest
import torch
from complete_run import write_complete_run
from documentation import blocks
from PIL import Image
from typer.testing import CliRunner

import omnivl
from engine.errors import PlanError
from launcher.cli import app
from omnivl.data.decode import decode_clip
from omnivl.data.limits import DecodeLimits
from omnivl.errors import UserError
from omnivl.inference.generate import ChainDecoder
from omnivl.inference.pictures import PictureSet

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.integration

PLAN = f"""
name: tiny
model:
  preset: {ROOT / "configs" / "models" / "debug.yaml"}
  ffn: {{kind: limoe, num_experts: 4, every: 1, router: {{kind: token_choice}}}}
stages:
  - name: words
    steps: 2
    data: [{{source: emoji, kind: image_text}}]
    objectives: [mlm]
    optimizer: {{warmup_steps: 1}}
  - name: spatial
    init_from: words
    steps: 5
    data: [{{source: emoji, kind: image_text}}]
    objectives: [univlc]
    optimizer: {{warmup_steps: 1}}
  - name: joint
    init_from: spatial
    steps: 7
    data: [{{source: emoji, kind: image_text}}]
    objectives: [univlc, lm]
    optimizer: {{warmup_steps: 1}}
  - name: later
    init_from: joint
    steps: 3
    data: [{{source: emoji, kind: image_text}}]
    objectives: [univlc]
    optimizer: {{warmup_steps: 1}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of which three stages are complete, with weights whose outputs lie apart."""
    return write_complete_run(tmp_path_factory.mktemp("runs") / "tiny", PLAN, stages=3, spread=5)


@pytest.fixture(scope="module")
def model(run):
    return omnivl.load(run, device="cpu")


def samples(model, media="image", where=None):
    where = where or {"label": ("bugs",)} | ({"style": ("twemoji",)} if media == "image" else {})
    return PictureSet("emoji", media, where, model.encoder.model.inputs, 1000, "media").samples


def command(*arguments):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})
    if result.exception is not None:
        raise result.exception
    return result.stdout


def said(call, *arguments, **options):
    """The message of what a call refuses."""
    with pytest.raises(UserError) as found:
        call(*arguments, **options)
    return str(found.value)


def test_importing_the_package_imports_none_of_its_layers():
    code = "import sys, omnivl; print(sorted({'torch', 'engine', 'launcher', 'moe', 'numpy'} & set(sys.modules)))"
    done = patience.run([sys.executable, "-c", code], capture_output=True, text=True, limit=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert {"load", "train", "Model"} <= set(dir(omnivl))
    with pytest.raises(AttributeError, match="no attribute 'loaad'"):
        omnivl.loaad  # noqa: B018


def test_embeddings_are_those_of_the_command(run, model, tmp_path):
    out = tmp_path / "e.npz"
    options = ["--data", "emoji", "--batch-size", "8", "--out", str(out)]
    command("embed", str(run), "--where", "{style: [twemoji], label: [bugs]}", *options)
    known = np.load(out)
    own = samples(model)
    found = model.encode_image([one.media for one in own], batch_size=8)
    assert found.dtype == torch.float32 and found.shape == (len(own), 16)
    assert np.array_equal(found.numpy(), known["pictures"])
    opened = (Image.open(io.BytesIO(one.media)) for one in own)
    assert torch.equal(model.encode_image(opened, batch_size=8), found), "a generator of PIL images"
    assert np.array_equal(model.encode_text(known["captions"].tolist(), batch_size=8).numpy(), known["texts"])
    assert torch.allclose(found.norm(dim=1), torch.ones(len(own)))
    assert not found.requires_grad
    command("embed", str(run), "--media", "video", "--where", "{label: [bugs]}", *options)
    clips = [one.media for one in samples(model, "video")]
    embedded = model.encode_video(clips, batch_size=8)
    assert np.array_equal(embedded.numpy(), np.load(out)["pictures"])
    whole = decode_clip(samples(model, "video")[0], DecodeLimits(), lambda total: list(range(total)))
    assert torch.equal(model.encode_video(whole), model.encode_video([clips[0]])), "one clip alone, as an array"


def test_labels_and_captions_are_those_of_the_command(run, model, tmp_path):
    where = "{style: [twemoji], label: [bugs, fruit]}"
    tasks = f"""
    tasks:
      - {{kind: zero_shot, where: {where}, prompts: ["{{label}}", "a drawing of {{label}}"]}}
      - {{kind: caption, where: {where}}}
    """
    (tmp_path / "tasks.yaml").write_text(tasks)
    printed = json.loads(command("evaluate", str(run), "--config", str(tmp_path / "tasks.yaml"), "--json"))
    scores = {score["metric"]: score["value"] for result in printed["results"] for score in result["scores"]}
    own = samples(model, where={"style": ("twemoji",), "label": ("bugs", "fruit")})
    media = [one.media for one in own]
    found = model.classify(media, ["bugs", "fruit"], ["{label}", "a drawing of {label}"], batch_size=64)
    hits = [row[0][0] == one.label for row, one in zip(found, own, strict=True)]
    assert sum(hits) / len(hits) == scores["accuracy, 2 classes"]
    for row in found:
        assert row[0][1] >= row[1][1]
        assert sum(share for _, share in row) == pytest.approx(1)
    (tasks_of_captions,) = (r for r in printed["results"] if r["scores"][0]["metric"] == "exact match")
    written = model.caption(media, batch_size=64)
    assert len(written) == len(own) == tasks_of_captions["scores"][0]["count"]
    sides = json.loads((run / "evaluation-joint.json").read_text())["results"][1]["galleries"][0]["examples"]
    chosen = [written[i * len(own) // 12] for i in range(12)]
    assert [one["given"] for one in sides] == chosen


def test_probabilities_are_the_softmax_over_the_learnt_temperature(model):
    media = samples(model)[0].media
    labels = ["red", "blue", "a dog"]
    found = dict(model.classify(media, labels)[0])
    scale = model.encoder.chain.contrast.scale().item()
    wanted = (scale * model.encode_image(media) @ model.encode_text(labels).T).softmax(-1)[0]
    assert [found[label] for label in labels] == pytest.approx(wanted.tolist(), rel=1e-5)


def test_a_search_finds_what_is_nearest(model):
    own = samples(model)
    gallery = model.encode_image([one.media for one in own])
    found = model.search(gallery[3], gallery, top=4)
    assert len(found) == 4 and found[0].index == 3 and found[0].score == pytest.approx(1)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    by_text = model.search("a red heart", gallery, top=1000)
    cosines = (gallery @ model.encode_text("a red heart")[0]).tolist()
    assert [one.index for one in by_text] == sorted(range(len(own)), key=lambda place: (-cosines[place], place))
    pictures = [Image.open(io.BytesIO(one.media)) for one in own[:3]]
    assert model.search(pictures[1], pictures)[0].index == 1
    texts = ["a dog", "a red heart", "two cats"]
    assert model.search("two cats", texts)[0].index == 2
    same = gallery[:1].expand(3, -1)
    assert [one.index for one in model.search(gallery[0], same)] == [0, 1, 2], "of equal ones the earlier first"


def test_routing_says_the_expert_of_each_patch_and_word(run, model, tmp_path):
    (sample, *_) = samples(model)
    found = model.routing(sample.media, sample.captions[0])
    assert [one.layer for one in found.layers] == ["visual_00", "visual_01", "text_00", "generation_00"]
    patch = model.encoder.model.inputs.patch_size
    assert found["visual_00"].patches.shape == (1, 32 // patch, 32 // patch)
    assert found["visual_00"].words == () and found["text_00"].patches is None
    assert found.words[0] == "[CLS]" and found.words[-1] == "[SEP]"
    assert " ".join(found.words[1:-1]) == sample.captions[0].lower()
    assert len(found["text_00"].words) == len(found.words)
    heard = []
    router = model.encoder.chain.visual_01.block.ffn.router
    hook = router.register_forward_hook(lambda module, inputs, routed: heard.append(routed.choices().expert_TK))
    model.encode_image(sample.media)
    hook.remove()
    assert heard[0][1:, 0].tolist() == found["visual_01"].patches.flatten().tolist(), "without the class token"
    alone = model.routing(text=sample.captions[0])
    assert alone["text_00"].words == found["text_00"].words and alone.view is None
    assert model.routing(sample.media).words == ()
    page = found._repr_html_()
    assert page.count("<img") == 2 and "[CLS]" in page
    clip = model.routing(samples(model, "video")[0].media, media="video")
    assert clip["visual_00"].patches.shape[0] == model.encoder.model.inputs.time_positions(4)
    assert clip["visual_00"].patches.min() >= 0
    assert repr(found) == f"<Routing of {(32 // patch) ** 2} patches and {len(found.words)} words in " + (
        "visual_00, visual_01, text_00, generation_00>"
    )


def test_words_have_no_expert_where_texts_are_bags_of_words(tmp_path):
    """Decoders and the visual encoder have experts; no layer encodes a text."""
    plan = PLAN.replace("  ffn:", "  text_layers: 0\n  text_pooling: mean\n  ffn:")
    bag = omnivl.load(write_complete_run(tmp_path / "bag", plan, stages=3, spread=5), device="cpu")
    (sample, *_) = samples(bag)
    found = bag.routing(sample.media)
    assert [one.layer for one in found.layers] == ["visual_00", "visual_01"]
    assert found.words == () and all(one.words == () for one in found.layers)
    beside = bag.routing(sample.media, sample.captions[0])
    assert [one.layer for one in beside.layers] == ["visual_00", "visual_01", "generation_00"], (
        "the decoder reads words"
    )
    assert beside["visual_01"].patches.equal(found["visual_01"].patches)
    assert "<img" in found._repr_html_()
    with pytest.raises(UserError) as refused:
        bag.routing(text=sample.captions[0])
    assert str(refused.value) == (
        "routing: got a text alone, but this model's text encoder has no layers with experts, so that no expert takes "
        "a word; allowed is a picture or a clip; give one, with the text or without it"
    )


def test_a_decoder_routes_words_as_it_does_when_it_writes_them(model):
    (sample, *_) = samples(model)
    encoder, heard = model.encoder, []
    ids = encoder.token_ids([sample.captions[0]])
    ids[:, 0] = encoder.tokenizer.special.decode
    router = encoder.chain.generation_00.block.ffn.router
    hook = router.register_forward_hook(lambda module, inputs, routed: heard.append(routed.choices().expert_TK[0, 0]))
    frames = PictureSet.of([sample], "image", encoder.model.inputs).frames([0])
    with torch.no_grad():
        decoder = ChainDecoder(encoder.chain, "lm", encoder.chain.features(frames), num_beams=1)
        for length in range(1, ids.shape[1] + 1):
            decoder(ids[:, :length], None)  # one token at a time, from what is kept of those before it
    hook.remove()
    found = model.routing(sample.media, sample.captions[0])
    took = found["generation_00"].words
    assert len(took) == len(found.words) > 2
    assert list(took) == [int(expert) for expert in heard[: len(took)]], "the start, then each token"


def test_labels_are_read_in_the_prompt_that_the_stage_knows(tmp_path):
    listed = "{kind: classify, names: [bugs, fruit, plant], field: label, prompt: 'a picture of {name}'}"
    entry = "{source: emoji, kind: image_label, name: own, prompts: ['it shows {label}'], fields: [label]}"
    before, after = PLAN.split("  - name: joint")
    data = "[{source: emoji, kind: image_text, fields: [label]}, " + entry + "]"
    after = after.replace("[{source: emoji, kind: image_text}]", data, 1).replace("[univlc, lm]", f"[univlc, {listed}]")
    run = write_complete_run(tmp_path / "listed", f"{before}  - name: joint{after}", stages=3, spread=5)
    one = omnivl.load(run, device="cpu")
    media = [sample.media for sample in samples(one)]

    def shares(labels, prompts=None, **options):
        return one.classify(media, labels, prompts, **options)

    assert shares(["bugs", "fruit"]) == shares(["bugs", "fruit"], ["a picture of {label}"])
    assert shares(["bugs", "cats"]) == shares(["bugs", "cats"], ["it shows {label}"]), "a list does not know 'cats'"
    assert shares(["bugs", "fruit"]) != shares(["bugs", "fruit"], ["{label}"])
    clips = [sample.media for sample in samples(one, "video")][:1]
    bare = one.classify(clips, ["bugs", "cats"], ["{label}"], media="video")
    assert one.classify(clips, ["bugs", "cats"], media="video") == bare, "no data with labels of clips"


def test_a_text_of_html_stays_a_text(model):
    assert "<script" not in model.routing(text="<script>alert(1)</script>")._repr_html_()


def test_a_model_says_what_it_is(run, model):
    assert re.fullmatch(
        r"<Model tiny, stage joint, step 7, \d\.\d M parameters on cpu: encode, classify, search, routing, caption>",
        repr(model),
    )
    assert "stage" in model._repr_html_() and "weights.safetensors" in model._repr_html_()
    assert repr(omnivl.load(run, stage="words", device="cpu")).endswith("on cpu: routing>")


def test_what_is_no_picture_gets_a_sentence(model, tmp_path):
    (tmp_path / "notes.txt").write_text("a text")
    (tmp_path / "notes.png").write_text("a text")
    told = said(model.encode_image, [Image.new("RGB", (9, 9)), tmp_path / "notes.txt"])
    assert told.startswith(f"pictures[1], {tmp_path / 'notes.txt'}: cannot be decoded (.txt is not read; known: ")
    assert "no known picture header in 6 bytes" in said(model.encode_image, str(tmp_path / "notes.png"))
    tiny = "pictures[0]: got a picture with a side of 1 pixels; allowed are sides of 8 or more, as less shows nothing; "
    assert said(model.encode_image, Image.new("RGB", (1, 1))) == tiny + "give a larger one"
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    assert "a side of 1 pixels" in said(model.caption, tmp_path / "one.png")
    assert "is no plain file" in said(model.encode_image, tmp_path) and "(No such file" in said(
        model.encode_image, "none.png"
    )
    assert said(model.encode_image, []) == "encode_image: got no pictures; allowed is at least one; give one"
    assert "got float32 [3, 9, 9]; allowed are PIL images" in said(model.encode_image, torch.zeros(3, 9, 9))
    buffer = io.BytesIO()
    Image.effect_noise((99, 99), 90).save(buffer, "PNG")
    cut = Image.open(io.BytesIO(buffer.getvalue()[:-2000]))
    assert "pictures[0]: cannot be read (OSError" in said(model.encode_image, cut)


def test_what_is_no_clip_gets_a_sentence(model, tmp_path):
    frame = np.zeros((9, 9, 3), dtype=np.uint8)
    long = [frame] * (4 * 3600 * 25)
    assert said(model.encode_video, [long]) == (
        "clips[0]: got a clip of 360,000 frames; allowed are 1 to 20,000; give a part of it"
    )
    assert "clips[0]: got a clip of 0 frames" in said(model.encode_video, [[]])
    gif = tmp_path / "long.gif"
    _write_long_gif(gif, 20_001)
    assert said(model.encode_video, gif) == (
        f"clips[0], {gif}: cannot be decoded (20001 frames; allowed: 20000); give a part of it, as ffmpeg -ss 0 -t 60 "
        "-i FILE PART cuts one out"
    )
    assert "clips[0]: got Image; allowed are lists of frames" in said(model.encode_video, Image.new("RGB", (9, 9)))
    (tmp_path / "clip.mp4").write_text("a text")
    assert "clip.mp4: cannot be decoded (" in said(model.encode_video, tmp_path / "clip.mp4")
    mixed = [frame, np.zeros((20, 9, 3), dtype=np.uint8)]
    assert "frames of 9 x 9 and of 9 x 20 pixels" in said(model.encode_video, mixed)


def test_what_is_no_text_gets_a_sentence(model):
    wanted = "texts[1]: got ' ', which has no word; allowed are texts with words; leave it out"
    assert said(model.encode_text, ["a dog", " "]) == wanted
    assert "texts[0]: got '\\u200b', which has no word" in said(model.encode_text, "\u200b")
    assert said(model.encode_text, ["a", 3]) == "texts[1]: got int; allowed are texts; convert it with str()"
    assert said(model.encode_text, []) == "texts: got none; allowed is at least one text; give one"
    assert "labels[0]: got ''" in said(model.classify, Image.new("RGB", (9, 9)), [""])
    assert "got 'a' more than once" in said(model.classify, Image.new("RGB", (9, 9)), ["a", "b", "a"])
    assert "prompts[0]: got 'a {name}'" in said(model.classify, Image.new("RGB", (9, 9)), ["a"], ["a {name}"])
    assert "got neither picture nor text" in said(model.routing)
    assert "batch_size: got 0" in said(model.encode_text, "a", batch_size=0)
    assert "got embeddings [1, 16] and [4, 3]" in said(model.search, "a", torch.zeros(4, 3))


def test_a_stage_without_the_head_names_those_that_have_it(run):
    spatial, words = (omnivl.load(run, stage=name, device="cpu") for name in ("spatial", "words"))
    picture = Image.new("RGB", (9, 9))
    assert said(spatial.caption, picture) == (
        "caption: got stage 'spatial', which does not train 'lm'; allowed are stages 'joint' of the plan; load one: "
        "omnivl.load(run, stage='joint')"
    )
    assert said(words.encode_text, "a dog").startswith(
        "encode_text: got stage 'words', which has no trained embeddings; allowed are stages 'spatial', 'joint', "
    )


def test_what_is_no_complete_run_gets_a_sentence(run, tmp_path):
    assert "got a run folder that is not there" in said(omnivl.load, tmp_path / "none")
    assert "holds no plan.yaml" in said(omnivl.load, str(tmp_path))
    assert "got stage 'later', which is not complete" in said(omnivl.load, run, stage="later")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "plan.yaml").write_text((run / "plan.yaml").read_text())
    assert "got a run without a complete stage" in said(omnivl.load, tmp_path / "begun")
    assert said(omnivl.load, run, device="cuda:77").startswith("device: got 'cuda:77'; allowed on this machine are ")
    (tmp_path / "text.txt").write_text("no weights")
    assert "text.txt" in said(omnivl.load, tmp_path / "text.txt")


def test_the_lines_of_the_documentation_run(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(run)
    Image.effect_noise((32, 40), 90).convert("RGB").save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    (lines,) = blocks(ROOT / "docs" / "python.md", "python")
    exec(lines, {})
    assert "<Routing of " in capsys.readouterr().out


def test_mistakes_in_a_plan_are_said_before_a_process_is_started(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    with pytest.raises(PlanError, match=r"stages\.joint\.stepps"):
        omnivl.train(tmp_path / "plan.yaml", {"stages.joint.stepps": 3}, run_folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _write_long_gif(path, frames):
    """A GIF of many frames of one pixel, on a screen of 16 x 16."""
    head = b"GIF89a" + (16).to_bytes(2, "little") * 2 + b"\x80\x00\x00" + b"\x00\x00\x00\xff\xff\xff"
    frame = b"\x2c\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02\x44\x01\x00"
    path.write_bytes(head + frame * frames + b"\x3b")
