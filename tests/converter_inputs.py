"""Public annotation files as small as they can be: of each form some good objects, and one for each way to be bad.

They have the names that the examples of ``omnivl data convert FORM --help`` give them. Pictures are 66 by 48.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import media_files


@dataclass(frozen=True)
class FormInput:
    """The files of a form.

    Attributes:
        write: Writes them into a folder.
        fields: What the reader is given; names of files are relative to the folder.
        samples: How many samples they give.
        rejected: How many objects are bad, by cause.
    """

    write: Callable[[Path], None]
    fields: dict[str, object]
    samples: int
    rejected: dict[str, int] = field(default_factory=dict)

    def arguments(self, folder: Path) -> dict[str, object]:
        """What the reader is given when the files are in a folder."""

        def placed(value: object) -> object:
            if isinstance(value, tuple):
                return tuple(placed(one) for one in value)
            return folder / value if isinstance(value, str) else value

        return {name: placed(value) for name, value in self.fields.items()}


def put_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def put_lines(path: Path, rows: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")


def put_pictures(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(media_files.saved("PNG" if name.endswith("png") else "JPEG"))


def put_clips(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(media_files.clip())


def karpathy(folder: Path) -> None:
    images = [
        {
            "filepath": "val2014",
            "sentids": [1, 2],
            "filename": f"COCO_val2014_00000000000{number}.jpg",
            "imgid": 0,
            "split": split,
            "cocoid": number,
            "sentences": [
                {"tokens": ["a", "dog"], "raw": text, "imgid": 0, "sentid": place} for place, text in enumerate(texts)
            ],
        }
        for number, split, texts in ((1, "restval", ["A dog. ", "A pet."]), (2, "test", ["A cat."]), (3, "val", [" "]))
    ]
    put_json(folder / "dataset_coco.json", {"dataset": "coco", "images": images})
    put_pictures(folder / "coco" / "val2014", *(str(image["filename"]) for image in images))


def captions(folder: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}],
    }
    put_json(folder / "annotations" / "captions_train2017.json", content)
    put_pictures(folder / "train2017", "1.jpg")


def flickr(folder: Path) -> None:
    image = {"sentids": [0], "imgid": 7, "filename": "1000.jpg", "split": "train", "sentences": [{"raw": "Two men."}]}
    put_json(folder / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": [image]})
    put_pictures(folder / "flickr30k-images", "1000.jpg")


def nocaps(folder: Path) -> None:
    images = [{"id": 0, "file_name": "0a.jpg", "open_images_id": "0a", "domain": "near-domain", "width": 66}]
    content = {"images": images, "annotations": [{"image_id": 0, "id": 5, "caption": "A yak."}], "licenses": []}
    put_json(folder / "nocaps_val_4500_captions.json", content)
    put_pictures(folder / "nocaps", "0a.jpg")


def paragraphs(folder: Path) -> None:
    rows = [{"image_id": number, "paragraph": " It is  red.\nIt runs. ", "url": "u"} for number in (5, 6)]
    put_json(folder / "paragraphs_v1.json", [*rows, {"image_id": 7, "paragraph": "", "url": "u"}])
    put_json(folder / "val_split.json", [5, 7])
    put_pictures(folder / "genome" / "VG_100K_2", "5.jpg", "6.jpg")


def genome_regions(folder: Path) -> None:
    def region(phrase: str, x: int = 33, width: int = 11) -> dict[str, object]:
        return {"region_id": 1, "image_id": 1, "phrase": phrase, "x": x, "y": 0, "width": width, "height": 24}

    rows = [
        {"id": 1, "regions": [region("red dog"), region(""), region("outside", x=99), region("red dog", width=33)]},
        {"id": 2, "regions": []},
    ]
    put_json(folder / "region_descriptions.json", rows)
    put_pictures(folder / "genome" / "VG_100K", "1.jpg")


def regions(folder: Path) -> None:
    elems = [
        {"caption": "dog", "attributes": ["red", "wet"], "bb": [33, 0, 11, 24]},
        {"caption": ["a cat", "pet"], "bb": [0, 0, 66, 48]},
        {"caption": "none", "bb": [1, 2]},
    ]
    put_lines(
        folder / "regions.jsonl",
        [{"image": "VG_100K/1.jpg", "caption": "Two pets.", "elems": elems}, {"image": "VG_100K/2.jpg", "elems": []}],
    )
    put_pictures(folder / "genome", "VG_100K/1.jpg")


def vqa(folder: Path) -> None:
    question = {"image_id": 1, "question": "what?", "question_id": 7}
    answers = [{"answer": "dog", "answer_confidence": "yes", "answer_id": number} for number in range(10)]
    answer = {"image_id": 1, "question_id": 7, "answers": answers, "multiple_choice_answer": "dog"}
    about = {"data_subtype": "train2014"}
    put_json(folder / "questions.json", about | {"questions": [question, question | {"question_id": 8}]})
    put_json(
        folder / "annotations.json",
        about | {"annotations": [answer | {"question_type": "what", "answer_type": "other"}]},
    )
    put_pictures(folder / "train2014", "COCO_train2014_000000000001.jpg")


def gqa(folder: Path) -> None:
    good = {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "dog"}],
        "entailed": ["02", "03"],
        "equivalent": ["01"],
        "question": "Is the dog red?",
        "imageId": "n16",
        "isBalanced": True,
        "groups": {"global": "color", "local": "10-dog_red"},
        "answer": "yes",
        "semanticStr": "select: dog",
        "annotations": {"answer": {}, "question": {"2": "n16"}, "fullAnswer": {}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes.",
    }
    rows = {
        "01": good,
        "02": {"question": "What is it?", "imageId": "n16", "isBalanced": False},
        "03": {name: value for name, value in good.items() if name != "answer"},
        "04": good | {"question": ""},
        "05": good | {"isBalanced": "yes"},
    }
    put_json(folder / "gqa" / "val_balanced_questions.json", rows)
    put_pictures(folder / "gqa" / "images", "n16.jpg")


def genome_questions(folder: Path) -> None:
    def asked(number: int, **given: object) -> dict[str, object]:
        qa = {"a_objects": [], "question": "Who?", "image_id": 1, "qa_id": number, "answer": "A dog.", "q_objects": []}
        return qa | given

    rows = [{"id": 1, "qas": [asked(1), asked(2), asked(3, answer=None), asked(4, question=" ")]}, {"id": 2}]
    put_json(folder / "question_answers.json", rows)
    put_pictures(folder / "genome", "1.jpg")


def nlvr2(folder: Path) -> None:
    good = {
        "sentence": "Both are red.",
        "left_url": "l",
        "right_url": "r",
        "label": "True",
        "synset": "dog",
        "query": "q",
    }
    good |= {"identifier": "train-10-3-0", "directory": 4, "validation": {}}
    rows = [
        good,
        good | {"identifier": "train-10-3-1", "label": "False"},
        good | {"identifier": "train-10"},
        good | {"identifier": "train-11-0-0"},
        good | {"identifier": "train-10-3-2", "label": "true"},
        good | {"identifier": "train-10-3-3", "sentence": ""},
        "{",
    ]
    put_lines(folder / "nlvr2" / "train.json", rows)
    put_pictures(folder / "nlvr2" / "images" / "train" / "4", "train-10-3-img0.png", "train-10-3-img1.png")


def snli_ve(folder: Path) -> None:
    good = {"Flickr30K_ID": "1000", "annotator_labels": ["neutral"], "captionID": "1000.jpg#0", "pairID": "1000#0n"}
    good |= {"gold_label": "neutral", "sentence1": "Two men.", "sentence2": "Two brothers."}
    good |= {"sentence1_parse": "", "sentence1_binary_parse": "", "sentence2_parse": "", "sentence2_binary_parse": ""}
    rows = [good, good | {"pairID": "1", "gold_label": "-"}, good | {"pairID": "2", "Flickr30K_ID": 9}]
    put_lines(folder / "snli_ve_dev.jsonl", [*rows, good | {"pairID": "3", "sentence2": None}])
    put_pictures(folder / "flickr30k-images", "1000.jpg")


def vcr(folder: Path) -> None:
    good = {
        "movie": "3015",
        "objects": ["person", "car", "person"],
        "img_fn": "lsmdc_3015/a@0.jpg",
        "metadata_fn": "lsmdc_3015/a@0.json",
        "question": ["Does", [2], "like", [0, 1], "?"],
        "answer_choices": [["Yes", "."], ["No", "."], ["No", ",", [0], "does", "."], [[0], "is", "away", "."]],
        "answer_label": 2,
        "rationale_choices": [["It", "snows", "."], ["A"], ["B"], [[1], "is", "red"]],
        "rationale_label": 0,
        "img_id": "val-0",
        "question_number": 0,
        "annot_id": "val-0",
    }
    test = {name: value for name, value in good.items() if not name.endswith("label")}
    rows = [
        good,
        test | {"annot_id": "test-1"},
        good | {"annot_id": "val-2", "question": ["Does", [3]]},
        good | {"annot_id": "val-3", "answer_choices": [["Yes"]]},
        good | {"annot_id": "val-4", "answer_label": 4},
        good | {"annot_id": "val-5", "metadata_fn": "none.json"},
        good | {"annot_id": "val-6", "objects": ["person", "car"], "question": ["Why", "?"]},
    ]
    put_lines(folder / "val.jsonl", rows)
    put_pictures(folder / "vcr1images", "lsmdc_3015/a@0.jpg")
    metadata = {"boxes": [[0, 0, 33, 24, 0.9]] * 3, "segms": [], "names": good["objects"], "width": 66, "height": 48}
    put_json(folder / "vcr1images" / "lsmdc_3015" / "a@0.json", metadata)


def visdial(folder: Path) -> None:
    def asked(question: int, **given: object) -> dict[str, object]:
        return {"question": question, "answer": 0, "answer_options": [0, 2, 1], "gt_index": 0} | given

    def dialog(number: int, *rounds: dict[str, object]) -> dict[str, object]:
        return {"image_id": number, "caption": "a dog", "dialog": list(rounds)}

    pools = {"questions": ["is it red", "is it wet"], "answers": ["yes", "no", "maybe"]}
    dialogs = [
        dialog(1, asked(0), asked(1, answer_options=[1, 0, 2], gt_index=2)),
        dialog(2, asked(0, gt_index=3), asked(5), asked(1, answer_options=[0, 9])),
        {"image_id": 3, "caption": "no dialog"},
    ]
    put_json(folder / "visdial_val.json", {"split": "val", "version": "1.0", "data": pools | {"dialogs": dialogs}})
    put_json(folder / "visdial_val_dense.json", [{"image_id": 1, "round_id": 2, "gt_relevance": [0.0, 1.0, 0.5]}])
    put_pictures(folder / "visdial" / "VisualDialog_val2018", *(f"VisualDialog_val2018_{n:012d}.jpg" for n in (1, 2)))


def refcoco(folder: Path) -> None:
    def ref(number: int, thing: int, *sentences: str) -> dict[str, object]:
        said = [{"tokens": [one], "raw": f"{one}!", "sent_id": 1, "sent": one} for one in sentences]
        named = {"ref_id": number, "ann_id": thing, "image_id": 1, "category_id": 1, "file_name": f"x_{number}.jpg"}
        return named | {"split": "testA", "sent_ids": [1], "sentences": said}

    def thing(number: int, segmentation: object, box: list[float]) -> dict[str, object]:
        return {"id": number, "image_id": 1, "bbox": box, "segmentation": segmentation, "iscrowd": 0, "area": 1.0}

    refs = [
        ref(1, 11, "red dog", "the dog", "red dog"),
        ref(2, 12, "crowd"),
        ref(3, 99, "x"),
        ref(4, 11),
        ref(5, 13, "x"),
    ]
    runs = {"counts": [48, 3, 66 * 48 - 51], "size": [48, 66]}
    things = [
        thing(11, [[10, 20, 14, 20, 14, 30, 10, 30]], [10, 20, 4, 10]),
        thing(12, runs, [1, 0, 1, 3]),
        thing(13, [[1, 2]], [0, 0, 1, 1]),
        thing(14, [], [0, 0, 0, 5]),
    ]
    images = [{"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "width": 66, "height": 48, "license": 1}]
    put_json(folder / "refcoco" / "instances.json", {"images": images, "annotations": things, "categories": []})
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    put_pictures(folder / "train2014", "COCO_train2014_000000000001.jpg")


def entities(folder: Path) -> None:
    root = folder / "flickr30k_entities"
    lines = ["[/EN#1/people Two men] with [/EN#2/bodyparts/other hats] [/EN#0/notvisual here] .", "[/EN#3 bad .", ""]
    put_lines(root / "Sentences" / "1000.txt", list(lines))
    put_lines(root / "Sentences" / "2000.txt", ["A [/EN#1/people man] ."])
    put_lines(root / "Sentences" / "3000.txt", ["A [/EN#1/people man] ."])
    boxes = "".join(
        f"<object><name>1</name><bndbox><xmin>{left}</xmin><ymin>1</ymin><xmax>{left + 33}</xmax><ymax>25</ymax>"
        "</bndbox></object>"
        for left in (1, 34)
    )
    size = "<size><width>66</width><height>48</height><depth>3</depth></size>"
    scene = "<object><name>2</name><scene>1</scene><nobndbox>1</nobndbox></object>"
    for name, inner in (("1000", f"<filename>1000.jpg</filename>{size}{boxes}{scene}"), ("2000", "<object>")):
        path = root / "Annotations" / f"{name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<annotation>{inner}</annotation>")
    (folder / "val.txt").write_text("1000\n2000\n")
    put_pictures(folder / "flickr30k-images", "1000.jpg")


def kinetics(folder: Path) -> None:
    rows = ["run,abcdefghijk,0,1,train", "run,missing,0,1,train"]
    put_lines(folder / "train.csv", ["label,youtube_id,time_start,time_end,split", *rows])
    put_clips(folder / "clips" / "dog", "abcdefghijk_000000_000001.mp4")


def ssv2(folder: Path) -> None:
    row = {"id": "1", "label": "holding dog", "template": "Holding [something]", "placeholders": ["dog"]}
    put_json(folder / "train.json", [row, row | {"id": "2"}])
    put_json(folder / "labels.json", {"Holding something": "0"})
    path = folder / "clips" / "dog" / "1.webm"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(media_files.clip("webm", "libvpx"))


def msrvtt(folder: Path) -> None:
    videos = [
        {"category": 9, "url": "u", "video_id": "video0", "start time": 1.0, "end time": 2.0, "split": "train", "id": 0}
    ]
    sentences = [
        {"caption": caption, "video_id": f"video{video}", "sen_id": number}
        for number, (video, caption) in enumerate([(0, "a dog"), (1, "x"), (0, "it runs"), (2, "y"), (0, "")])
    ]
    put_json(folder / "MSRVTT_data.json", {"info": {}, "videos": videos, "sentences": sentences})
    (folder / "MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo2\n")
    (folder / "MSRVTT_JSFUSION_test.csv").write_text("key,vid_key,video_id,sentence\nret0,msr0,video0,a dog runs\n")
    put_clips(folder / "clips", "video0.mp4")


def msvd(folder: Path) -> None:
    lines = [
        "# ids and captions",
        "-4ws_5_15 a squirrel",
        "-4ws_5_15 it eats",
        "other_1_2 x",
        "-4ws_5_15",
        "third_1_2 x",
    ]
    put_lines(folder / "AllVideoDescriptions.txt", list(lines))
    (folder / "val_list.txt").write_text("-4ws_5_15\nother_1_2\n")
    put_clips(folder / "clips" / "YouTubeClips", "-4ws_5_15.mp4")


def didemo(folder: Path) -> None:
    good = {"video": "5@N0_a.avi", "description": "a dog", "times": [[0, 0]], "annotation_id": 1, "num_segments": 6}
    good |= {"dl_link": "u", "reference_description": "x", "context": "x"}
    rows = [good, good | {"description": "it runs"}, good | {"video": "none.avi"}, good | {"description": None}]
    put_json(folder / "test_data.json", rows)
    put_clips(folder / "clips", "5@N0_a.mp4")


def activitynet(folder: Path) -> None:
    good = {"duration": 8.0, "timestamps": [[0, 1], [1, 2]], "sentences": ["A dog. ", " It runs."]}
    put_json(folder / "val_1.json", {"v_a-b": good, "v_c": good, "v_d": good | {"sentences": [""]}, "v_e": []})
    put_clips(folder / "clips", "v_a-b.mp4")


def video_questions(folder: Path) -> None:
    good = {"answer": "dog", "category_id": 1, "id": 158, "question": "What runs?", "video_id": 0}
    rows = [good, good | {"id": 159, "video_id": 7}, good | {"id": 160, "answer": ""}]
    put_json(folder / "test_qa.json", rows)
    put_lines(folder / "val_qa.json", [{"answer": "dog", "question": "is it?", "video_id": 1, "id": 4}])
    (folder / "youtube_mapping.txt").write_text("-4ws_5_15 vid1\n")
    put_clips(folder / "clips", "video0.mp4", "-4ws_5_15.mp4")


def violin(folder: Path) -> None:
    good = {
        "file": "friends_s01",
        "split": "train",
        "sub": [["So what?", "0:1", "0:2"], [" I  know."]],
        "statement": [["He asks.", "He sings."], ["She knows.", ""]],
        "span": [[0, 1], [1, 2]],
        "source": "tv_show",
    }
    put_json(
        folder / "violin_annotation.json", {"a": good, "b": good | {"file": "none"}, "c": good | {"statement": []}}
    )
    put_clips(folder / "clips", "friends_s01.mp4")


def mosi(folder: Path) -> None:
    header = "video_id,clip_id,text,label,label_T,label_A,label_V,annotation,mode"
    rows = [
        'abc,1,"A GOOD FILM, OR NOT",-1.6,,,,Negative,train',
        "abc,2,NO CLIP,2,,,,Positive,valid",
        "abc,3,X,x,,,,Y,train",
        "abc,4,X,4,,,,Y,train",
    ]
    put_lines(folder / "label.csv", [header, *rows])
    put_clips(folder / "Raw" / "abc", "1.mp4")


_MISSING_CLIPS = {"missing_media": 1}

INPUTS: dict[str, FormInput] = {
    "coco": FormInput(karpathy, {"annotations": "dataset_coco.json", "images": "coco"}, 2, {"missing_caption": 1}),
    "paragraphs": FormInput(
        paragraphs,
        {"paragraphs": "paragraphs_v1.json", "images": "genome", "lists": ("val_split.json",)},
        1,
        {"missing_caption": 1, "missing_field": 1},
    ),
    "genome-regions": FormInput(
        genome_regions,
        {"regions": "region_descriptions.json", "images": "genome"},
        1,
        {"missing_caption": 2, "wrong_field": 1},
    ),
    "regions": FormInput(
        regions, {"regions": "regions.jsonl", "images": "genome"}, 1, {"missing_caption": 1, "wrong_field": 1}
    ),
    "vqa": FormInput(
        vqa,
        {"questions": "questions.json", "images": "train2014", "annotations": "annotations.json"},
        1,
        {"missing_field": 1},
    ),
    "gqa": FormInput(
        gqa,
        {"questions": "gqa/val_balanced_questions.json", "images": "gqa/images"},
        2,
        {"missing_caption": 1, "missing_field": 1, "wrong_field": 1},
    ),
    "genome-questions": FormInput(
        genome_questions,
        {"questions": "question_answers.json", "images": "genome"},
        2,
        {"missing_caption": 1, "missing_field": 1, "wrong_field": 1},
    ),
    "nlvr2": FormInput(
        nlvr2,
        {"sentences": "nlvr2/train.json", "images": "nlvr2/images"},
        2,
        {"missing_caption": 1, "missing_label": 1, "missing_media": 1, "wrong_field": 1, "wrong_json": 1},
    ),
    "snli-ve": FormInput(
        snli_ve,
        {"hypotheses": "snli_ve_dev.jsonl", "images": "flickr30k-images"},
        1,
        {"missing_caption": 1, "missing_label": 1, "missing_media": 1},
    ),
    "vcr": FormInput(
        vcr,
        {"questions": "val.jsonl", "images": "vcr1images"},
        2,
        {"missing_caption": 1, "missing_media": 1, "wrong_field": 3},
    ),
    "visdial": FormInput(
        visdial,
        {"dialogs": "visdial_val.json", "images": "visdial", "dense": "visdial_val_dense.json"},
        2,
        {"missing_field": 1, "wrong_field": 3},
    ),
    "refcoco": FormInput(
        refcoco,
        {"refs": "refcoco/refs(unc).p", "instances": "refcoco/instances.json", "images": "train2014"},
        2,
        {"missing_caption": 1, "missing_field": 1, "wrong_field": 1},
    ),
    "entities": FormInput(
        entities,
        {"folder": "flickr30k_entities", "images": "flickr30k-images", "lists": ("val.txt",)},
        1,
        {"missing_field": 1, "wrong_field": 2},
    ),
    "kinetics": FormInput(kinetics, {"table": "train.csv", "clips": "clips"}, 1, _MISSING_CLIPS),
    "ssv2": FormInput(
        ssv2, {"entries_file": "train.json", "clips": "clips", "labels": "labels.json"}, 1, _MISSING_CLIPS
    ),
    "msrvtt": FormInput(
        msrvtt,
        {"captions": "MSRVTT_data.json", "clips": "clips", "lists": ("MSRVTT_train.9k.csv",)},
        1,
        {"missing_caption": 1, "missing_field": 1, "missing_media": 1},
    ),
    "msvd": FormInput(
        msvd,
        {"captions": "AllVideoDescriptions.txt", "clips": "clips", "lists": ("val_list.txt",)},
        1,
        {"missing_caption": 1, "missing_field": 1, "missing_media": 1},
    ),
    "didemo": FormInput(
        didemo, {"captions": "test_data.json", "clips": "clips"}, 1, {"missing_caption": 1, "missing_media": 1}
    ),
    "activitynet": FormInput(
        activitynet,
        {"captions": "val_1.json", "clips": "clips"},
        1,
        {"missing_caption": 1, "missing_media": 1, "wrong_json": 1},
    ),
    "video-questions": FormInput(
        video_questions, {"questions": "test_qa.json", "clips": "clips"}, 1, {"missing_media": 1, "wrong_field": 1}
    ),
    "violin": FormInput(
        violin,
        {"statements": "violin_annotation.json", "clips": "clips"},
        2,
        {"missing_caption": 4, "missing_media": 2, "wrong_field": 1},
    ),
    "mosi": FormInput(mosi, {"labels": "label.csv", "clips": "Raw"}, 1, {"missing_media": 1, "wrong_field": 2}),
}
"""By form."""
