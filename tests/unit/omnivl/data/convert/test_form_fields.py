"""What each reader of a public data set writes into its samples, field by field."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import converter_inputs as inputs
import numpy as np
import pytest
from PIL import Image

from omnivl.data.config import DataEntryConfig
from omnivl.data.convert import FORMS, ConvertOptions, convert
from omnivl.data.sources import open_source
from omnivl.errors import DataError

READERS = {cls.form: cls for cls in FORMS}
ALWAYS = {"file", "identity", "split", "width", "height"}


def converted(place: Path, form: str, **changed: object) -> dict[str, dict[str, object]]:
    """The samples' JSON by name; in ``members`` the other files' extensions."""
    inputs.INPUTS[form].write(place)
    return read(place, form, **(inputs.INPUTS[form].arguments(place) | changed))


def read(place: Path, form: str, **arguments: object) -> dict[str, dict[str, object]]:
    convert(READERS[form](**arguments), place / "out", ConvertOptions(overwrite=True))
    found: dict[str, dict[str, object]] = {}
    members: dict[str, list[str]] = {}
    for shard in sorted((place / "out").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for name in tar.getnames():
                key, _, extension = name.partition(".")
                if extension == "json":
                    fields = json.load(tar.extractfile(name))
                    found[key] = fields
                else:
                    members.setdefault(key, []).append(extension)
    return {fields["file"]: fields | {"members": members[key]} for key, fields in found.items()}


def own(fields: dict[str, object]) -> dict[str, object]:
    """What is of this form, without what every sample has."""
    return {name: value for name, value in fields.items() if name not in ALWAYS}


def test_karpathy(tmp_path):
    found = converted(tmp_path, "coco")
    first, second = found["val2014/COCO_val2014_000000000001.jpg"], found["val2014/COCO_val2014_000000000002.jpg"]
    assert own(first) == {"captions": ["A dog.", "A pet."], "image_id": 1, "members": ["jpg"]}
    assert (first["split"], first["identity"]) == ("restval", "image 1")
    assert own(second) == {"caption": "A cat.", "image_id": 2, "members": ["jpg"]}
    assert second["split"] == "test"
    folded = converted(tmp_path, "coco", restval_as_train=True)
    assert [fields["split"] for fields in folded.values()] == ["test", "train"]


def test_karpathy_of_flickr(tmp_path):
    inputs.flickr(tmp_path)
    (found,) = read(
        tmp_path, "coco", annotations=tmp_path / "dataset_flickr30k.json", images=tmp_path / "flickr30k-images"
    ).values()
    assert own(found) == {"caption": "Two men.", "image_id": 7, "members": ["jpg"]}
    assert (found["split"], found["identity"]) == ("train", "flickr30k 1000"), "as the other sets on these pictures"


def test_nocaps(tmp_path):
    inputs.nocaps(tmp_path)
    arguments = {"annotations": tmp_path / "nocaps_val_4500_captions.json", "images": tmp_path / "nocaps"}
    (found,) = read(tmp_path, "coco", **arguments, split="val").values()
    assert own(found) == {"caption": "A yak.", "image_id": 0, "domain": "near-domain", "members": ["jpg"]}
    assert (found["split"], found["identity"]) == ("val", "open images 0a"), "no picture of COCO with this number"


def test_paragraphs(tmp_path):
    (found,) = converted(tmp_path, "paragraphs").values()
    assert own(found) == {"caption": "It is red. It runs.", "image_id": 5, "members": ["jpg"]}
    assert (found["split"], found["identity"]) == ("val", "genome 5")
    everything = converted(tmp_path, "paragraphs", lists=())
    assert len(everything) == 2 and "split" not in everything["5"]


def test_regions_of_visual_genome(tmp_path):
    (found,) = converted(tmp_path, "genome-regions").values()
    assert found["captions"] == ["red dog", "outside"]
    assert found["regions"] == [
        {"caption": "red dog", "box": [0.5, 0.0, pytest.approx(44 / 66), 0.5]},
        {"caption": "red dog", "box": [0.5, 0.0, 1.0, 0.5]},
    ]
    assert (found["identity"], found["image_id"]) == ("genome 1", 1)
    lines = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    (outside,) = [one["detail"] for one in lines if one["cause"] == "wrong_field"]
    assert outside.startswith("'regions' is [99.0, 0.0, 11.0, 24.0] in a picture of 66 x 48; allowed: boxes")


def test_regions_of_xvlm(tmp_path):
    (found,) = converted(tmp_path, "regions").values()
    box, whole = [0.5, 0.0, pytest.approx(44 / 66), 0.5], [0.0, 0.0, 1.0, 1.0]
    assert own(found) == {
        "caption": "Two pets.",
        "regions": [
            {"attribute": "red dog", "box": box},
            {"attribute": "wet dog", "box": box},
            {"caption": "a cat", "box": whole},
            {"caption": "pet", "box": whole},
        ],
        "members": ["jpg"],
    }


def test_gqa(tmp_path):
    found = converted(tmp_path, "gqa")
    assert own(found["01"]) == {
        "caption": "Is the dog red?",
        "question": "Is the dog red?",
        "question_id": "01",
        "image_id": "n16",
        "answers": ["yes"],
        "structural": "verify",
        "semantic": "attr",
        "detailed": "verifyAttr",
        "group": "10-dog_red",
        "global_group": "color",
        "entailed": ["02", "03"],
        "equivalent": ["01"],
        "balanced": True,
        "members": ["jpg"],
    }
    assert (found["01"]["split"], found["01"]["identity"]) == ("val", "genome n16")
    assert own(found["02"]).keys() == {"caption", "question", "question_id", "image_id", "balanced", "members"}
    folder = tmp_path / "all"
    folder.mkdir()
    (tmp_path / "gqa/val_balanced_questions.json").rename(folder / "train_all_questions_0.json")
    several = read(tmp_path, "gqa", questions=folder, images=tmp_path / "gqa/images")
    assert [fields["split"] for fields in several.values()] == ["train", "train"]
    assert (several["01"]["group"], several["01"]["global_group"]) == ("10-dog_red", "color")
    path = folder / "train_all_questions_0.json"
    path.write_text(path.read_text().replace('"global": "color"', '"global": null'))
    without = read(tmp_path, "gqa", questions=folder, images=tmp_path / "gqa/images")
    assert without["01"]["group"] == "10-dog_red" and "global_group" not in without["01"]


def test_questions_of_visual_genome(tmp_path):
    found = converted(tmp_path, "genome-questions")
    expected = {"question": "Who?", "question_id": 1, "image_id": 1, "answers": ["A dog."]}
    assert own(found["1"]) == expected | {"caption": "Who?", "members": ["jpg"]}
    assert {fields["identity"] for fields in found.values()} == {"genome 1"}


def test_nlvr2(tmp_path):
    found = converted(tmp_path, "nlvr2")
    first, second = found["train-10-3-0"], found["train-10-3-1"]
    expected = {"caption": "Both are red.", "answer": "true", "identifier": "train-10-3-0"}
    assert own(first) == expected | {"members": ["left.png", "right.png"]}
    assert (second["answer"], second["split"], second["identity"]) == ("false", "train", "nlvr2 train-10-3")
    (lines,) = (tmp_path / "nlvr2/images/train").iterdir()
    for name in ("train-10-3-img0.png", "train-10-3-img1.png"):
        (lines / name).rename(tmp_path / "nlvr2/images" / name)
    assert set(converted_again(tmp_path, "nlvr2")) == {"train-10-3-0", "train-10-3-1"}, (
        "also where all lie in one folder"
    )


def converted_again(folder: Path, form: str) -> dict[str, dict[str, object]]:
    return read(folder, form, **inputs.INPUTS[form].arguments(folder))


def test_snli_ve(tmp_path):
    (found,) = converted(tmp_path, "snli-ve").values()
    assert own(found) == {
        "caption": "Two brothers.",
        "premise": "Two men.",
        "answer": "neutral",
        "pair_id": "1000#0n",
        "members": ["jpg"],
    }
    assert (found["split"], found["identity"]) == ("dev", "flickr30k 1000")


def test_vcr(tmp_path):
    found = converted(tmp_path, "vcr")
    assert own(found["val-0"]) == {
        "caption": "Does Riley like Casey and car ?",
        "question": "Does Riley like Casey and car ?",
        "options": ["Yes .", "No .", "No , Casey does .", "Casey is away ."],
        "option": 2,
        "answer": "No , Casey does .",
        "rationales": ["It snows .", "A", "B", "car is red"],
        "rationale": 0,
        "objects": ["person", "car", "person"],
        "boxes": [[0.0, 0.0, 0.5, 0.5]] * 3,
        "annot_id": "val-0",
        "members": ["jpg"],
    }
    assert (found["val-0"]["split"], found["val-0"]["identity"]) == ("val", "vcr lsmdc_3015/a@0.jpg")
    assert found["test-1"]["split"] == "test" and not {"option", "rationale"} & set(found["test-1"])


def test_boxes_of_vcr_in_a_form_that_nobody_knows_stop_everything(tmp_path):
    inputs.vcr(tmp_path)
    inputs.put_json(tmp_path / "vcr1images/lsmdc_3015/a@0.json", {"boxes": [], "depths": []})
    with pytest.raises(DataError) as caught:
        converted_again(tmp_path, "vcr")
    assert str(caught.value) == (
        f"{tmp_path}/val.jsonl:1: lsmdc_3015/a@0.json: VCR is not known to have 'depths'; allowed: boxes, segms, "
        "names, width, height; look what they mean, and take them out of the file if nothing is lost"
    )


def test_visdial(tmp_path):
    found = converted(tmp_path, "visdial")
    assert own(found["1-1"]) == {
        "caption": "is it red",
        "question": "is it red",
        "image_caption": "a dog",
        "history": [],
        "options": ["yes", "maybe", "no"],
        "option": 0,
        "image_id": 1,
        "round_id": 1,
        "members": ["jpg"],
    }
    second = found["1-2"]
    assert (second["history"], second["option"], second["relevance"]) == ([["is it red", "yes"]], 2, [0.0, 1.0, 0.5])
    assert second["dense"] == "yes"
    assert (second["split"], second["identity"]) == ("val", "visdial 1")


def test_the_test_of_visdial_asks_the_last_round(tmp_path):
    rounds = [{"question": 0, "answer": 1}, {"question": 1, "answer_options": [1, 0]}]
    pools = {"questions": ["is it red", "is it wet"], "answers": ["yes", "no"]}
    data = pools | {"dialogs": [{"image_id": 5, "caption": "a dog", "dialog": rounds}]}
    inputs.put_json(tmp_path / "test.json", {"split": "test", "data": data})
    inputs.put_pictures(tmp_path / "images", "VisualDialog_test2018_000000000005.jpg")
    (found,) = read(tmp_path, "visdial", dialogs=tmp_path / "test.json", images=tmp_path / "images").values()
    assert (found["round_id"], found["history"]) == (2, [["is it red", "no"]])
    assert found["options"] == ["no", "yes"] and "option" not in found


def test_refcoco(tmp_path):
    found = converted(tmp_path, "refcoco")
    assert own(found["1"]) == {
        "captions": ["red dog", "the dog"],
        "box": [pytest.approx(one) for one in (10 / 66, 20 / 48, 14 / 66, 30 / 48)],
        "candidates": [
            [pytest.approx(one) for one in box]
            for box in ((10 / 66, 20 / 48, 14 / 66, 30 / 48), (1 / 66, 0, 2 / 66, 3 / 48), (0, 0, 1 / 66, 1 / 48))
        ],
        "target": 0,
        "ref_id": 1,
        "image_id": 1,
        "members": ["jpg", "mask.png"],
    }
    assert (found["1"]["split"], found["1"]["identity"]) == ("testA", "image 1")
    entry = DataEntryConfig(str(tmp_path / "out"), "image_text", fields={"box": "box", "mask": "mask.png"})
    assert found["2"]["target"] == 1
    source = open_source(entry, seed=0)
    masks = [np.asarray(Image.open(io.BytesIO(source.read(index).members["mask.png"]))) for index in (0, 1)]
    expected = np.zeros((2, 48, 66), np.uint8)
    expected[0, 20:30, 10:14] = 255
    expected[1, :3, 1] = 255
    assert np.array_equal(masks, expected)


def test_each_expression_of_an_object_may_be_a_sample(tmp_path):
    whole = converted(tmp_path, "refcoco")
    each = converted(tmp_path, "refcoco", each_expression=True)
    assert [each[name]["caption"] for name in ("1-0", "1-1")] == ["red dog", "the dog"]
    for name in ("1-0", "1-1"):
        assert own(each[name]) | own(whole["1"]) == own(each[name]) | {"captions": ["red dog", "the dog"]}
    assert sum(name.startswith("1-") for name in each) == 3, "an equal expression of somebody else counts as well"


def test_each_phrase_may_be_a_sample(tmp_path):
    (found,) = converted(tmp_path, "entities", each_phrase=True).values()
    expected = {"caption": "Two men", "box": [0.0, 0.0, 1.0, 0.5], "image_id": "1000", "members": ["jpg"]}
    assert own(found) == expected
    assert (found["identity"], found["split"]) == ("flickr30k 1000", "val")


def test_phrases_without_boxes_and_lines_with_a_mark_left_are_listed(tmp_path):
    """The line with a mark left is refused once, whether it is a sentence or its phrases are samples."""
    left = ("wrong_field", "1000.txt:2", "a mark is left in '[/EN#3 bad .'; allowed: [/EN#NUMBER/TYPE phrase]")
    for each_phrase in (False, True):
        converted(tmp_path, "entities", each_phrase=each_phrase)
        lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
        told = [(one["cause"], Path(one["where"]).name, one["detail"]) for one in lines]
        of_line = [one for one in told if one[1].startswith("1000.txt")]
        without = [("missing_field", "1000.txt:1", f"{phrase!r} has no box") for phrase in ("hats", "here")]
        assert of_line == ([*without, left] if each_phrase else [left])
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert sum(manifest["rejected"].values()) == len(lines) == len(of_line) + 2, "and the pictures without boxes"


def test_a_line_with_a_mark_left_gives_no_phrase(tmp_path):
    inputs.entities(tmp_path)
    (tmp_path / "flickr30k_entities/Sentences/1000.txt").write_text("[/EN#1/people Two men] with [/EN#2 hats] .\n")
    with pytest.raises(
        DataError, match=r"1000\.txt:1: wrong_field: a mark is left in 'Two men with \[/EN#2 hats\] \.'"
    ):
        read(tmp_path, "entities", **inputs.INPUTS["entities"].arguments(tmp_path), each_phrase=True)


def test_phrases(tmp_path):
    (found,) = converted(tmp_path, "entities").values()
    assert own(found) == {
        "caption": "Two men with hats here .",
        "phrases": ["Two men", "hats", "here"],
        "phrase_ids": ["1", "2", "0"],
        "phrase_boxes": [[[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5]], [], []],
        "image_id": "1000",
        "members": ["jpg"],
    }
    assert (found["split"], found["identity"]) == ("val", "flickr30k 1000")


def test_boxes_of_phrases_that_define_entities_are_left_out(tmp_path):
    inputs.entities(tmp_path)
    file = tmp_path / "flickr30k_entities/Annotations/1000.xml"
    file.write_text(f'<!DOCTYPE a [<!ENTITY b "bb">]>{file.read_text()}')
    with pytest.raises(DataError, match=r"1000\.xml: wrong_field: it defines entities; allowed: XML without"):
        converted_again(tmp_path, "entities")


@pytest.mark.parametrize(
    ("form", "captions", "video"),
    [
        ("msrvtt", ["a dog", "it runs"], "video0"),
        ("msvd", ["a squirrel", "it eats"], "-4ws_5_15"),
        ("didemo", "a dog it runs", "5@N0_a.avi"),
        ("activitynet", "A dog. It runs.", "v_a-b"),
    ],
)
def test_captions_of_videos(tmp_path, form, captions, video):
    (found,) = converted(tmp_path, form).values()
    said = {"captions": captions} if isinstance(captions, list) else {"caption": captions}
    assert own(found) == said | {"video_id": video, "members": ["mp4"]}
    assert found["identity"] == f"video {Path(found['file']).stem}"
    assert found["split"] == {"msrvtt": "train", "didemo": "test"}.get(form, "val")


def test_the_test_of_a_thousand_clips(tmp_path):
    inputs.msrvtt(tmp_path)
    (found,) = read(
        tmp_path, "msrvtt", captions=tmp_path / "MSRVTT_JSFUSION_test.csv", clips=tmp_path / "clips"
    ).values()
    assert (found["caption"], found["split"], found["video_id"]) == ("a dog runs", "test", "video0")


def test_captions_in_a_pickle_are_read_without_running_it(tmp_path):
    inputs.msvd(tmp_path)
    file, arguments = tmp_path / "raw-captions.pkl", {"clips": tmp_path / "clips"}
    file.write_bytes(pickle.dumps({"-4ws_5_15": [["a", "squirrel"], ["it", "eats"]], "x": "no list"}))
    (found,) = read(tmp_path, "msvd", captions=file, **arguments).values()
    assert found["captions"] == ["a squirrel", "it eats"]
    file.write_bytes(pickle.dumps(["a", "list"]))
    with pytest.raises(DataError, match="holds a list; allowed: captions by video; give another file"):
        read(tmp_path, "msvd", captions=file, **arguments)


def test_questions_about_videos(tmp_path):
    (found,) = converted(tmp_path, "video-questions").values()
    expected = {"question": "What runs?", "question_id": 158, "question_type": "what", "answers": ["dog"]}
    assert own(found) == expected | {"caption": "What runs?", "members": ["mp4"]}
    assert (found["split"], found["identity"]) == ("test", "video video0")
    arguments = {"questions": tmp_path / "val_qa.json", "clips": tmp_path / "clips"}
    (mapped,) = read(tmp_path, "video-questions", **arguments, mapping=tmp_path / "youtube_mapping.txt").values()
    assert (mapped["identity"], mapped["question_type"]) == ("video -4ws_5_15", "other")


def test_violin(tmp_path):
    found = converted(tmp_path, "violin")
    expected = {"caption": "He asks.", "subtitle": "So what? I know.", "answer": "true", "pair_id": "a-0"}
    assert own(found["a-0-true"]) == expected | {"members": ["mp4"]}
    assert own(found["a-0-false"]) == expected | {"caption": "He sings.", "answer": "false", "members": ["mp4"]}
    assert (found["a-0-true"]["split"], found["a-0-true"]["identity"]) == ("train", "violin a")
    beside = converted(tmp_path, "violin", subtitles=True)
    assert beside["a-0-true"]["caption"] == "He asks. So what? I know."
    assert beside["a-0-false"]["caption"] == "He sings. So what? I know."


def test_mosi(tmp_path):
    (found,) = converted(tmp_path, "mosi").values()
    expected = {"caption": "A GOOD FILM, OR NOT", "sentiment": -1.6, "segment_id": "abc$_$1", "members": ["mp4"]}
    assert own(found) == expected
    assert (found["split"], found["identity"]) == ("train", "mosi abc 1")
