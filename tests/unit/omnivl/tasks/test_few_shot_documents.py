"""Few-shot tasks on documents with pictures at their places: what the model reads, and how likely answers are."""

import math
from dataclasses import replace

import pytest
import torch
from oracle import TOKENIZER
from small_towers import scattered

from omnivl.architectures import Flamingo
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.data.documents import read_document
from omnivl.data.tokenizer import load_readers
from omnivl.errors import DataError
from omnivl.inference import documents
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.objectives import InterleavedLM
from omnivl.tasks import FewShotTask, few_shot
from omnivl.tasks.run import run_tasks

LABELS = ("drink", "fruit")
TASK = FewShotTask(
    objective="interleaved_lm",
    source="emoji",
    where={"label": LABELS, "style": ("noto",)},
    support={"label": LABELS, "style": ("fluent",)},
    answer="label",
    answers=LABELS,
    example="{answer}",
    query="what?",
    max_samples=3,
)
TINY = Flamingo.presets["tiny"]
MODEL = replace(TINY, language=replace(TINY.language, vocab_size=TOKENIZER.special.vocab_size))


def encoder(length: int = 48) -> Encoder:
    torch.manual_seed(0)
    model = replace(MODEL, language=replace(MODEL.language, length=length))
    chain = scattered(build_chain(model, (InterleavedLM(),), TOKENIZER.special)).eval()
    readers = load_readers(model.text_inputs, TOKENIZER)
    return Encoder(chain, model, TOKENIZER, LocalGather(), torch.device("cpu"), batch_size=8, readers=readers)


def test_examples_stand_before_the_query_each_behind_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[PictureSet, list[str], torch.Tensor]] = []

    def hears(key, pictures, texts, answers, own):  # type: ignore[no-untyped-def]
        found = documents.answer_log_probabilities(key, pictures, texts, answers, own)
        heard.append((pictures, list(texts), found))
        return found

    monkeypatch.setattr(few_shot, "answer_log_probabilities", hears)
    own = encoder()
    (result,) = run_tasks([TASK], own)
    assert [score.metric for score in result.scores] == [f"accuracy, {shots} shots" for shots in (0, 4, 8)]
    assert [texts[0].count("<image>") for _, texts, _ in heard] == [1, 5, 9]
    assert [len(pictures.samples[0].members) for pictures, _, _ in heard] == [1, 5, 9]
    for _, texts, _ in heard:
        assert all(text.endswith("<image>what?") and not text.endswith("<EOC>") for text in texts)
    assert heard[0][1][0].count("<EOC>") == 2, "two examples without pictures show the form of an answer"

    pictures, texts, found = heard[1]
    reader, other = own.readers["language"], InterleavedLM()
    whole = [read_document(f"{texts[1]} {label}<EOC>", reader) for label in LABELS]
    begun = len(read_document(texts[1], reader).ids)
    for place, document in enumerate(whole):
        rows = other.rows([document], reader, [begun])
        number = len(document.ids) - begun
        assert int((rows["interleaved_lm/targets"] != -100).sum()) == number
        frames = own.shown(pictures, [1]).frames
        layout = plan_layout((other,), "images_text", 1, 5)
        with torch.no_grad():
            loss = own.chain(State({"frames": frames, **rows}, layout))["loss"]
        assert math.isclose(float(found[1, place]), -float(loss) * number, rel_tol=1e-4)


def test_a_document_that_is_too_long_is_refused() -> None:
    with pytest.raises(DataError, match=r"with an answer has \d+ tokens; allowed: 20, model\.language\.length; lower"):
        run_tasks([TASK], encoder(length=20))
