"""Evaluation tasks with an oracle in the chain's place: right answers must score 1, on any number of replicas."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from omnivl.architectures import OmniVL
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather, LocalGather
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import DataError, UserError
from omnivl.inference.encoder import Encoder
from omnivl.inference.generate import SearchOptions
from omnivl.inference.pictures import PictureSet, shared_batches
from omnivl.objectives import LM, Objective
from omnivl.tasks import BaselineReference, CaptionTask, RetrievalTask, ZeroShotTask, retrieval, zero_shot
from omnivl.tasks.captions import write_captions
from omnivl.tasks.reranking import matching_of_texts
from omnivl.tasks.retrieval import _texts_and_relevance
from omnivl.tasks.run import run_tasks
from omnivl.tasks.scorers import recall
from omnivl.tasks.scorers.captions import caption_scores
from omnivl.tasks.scorers.recall import ranks_both_ways

TOKENIZER = load_tokenizer("emoji")
MODEL = replace(OmniVL.presets["tiny"], vocab_size=TOKENIZER.special.vocab_size, image_size=16, video_size=64)
WHERE = {"style": ("twemoji",), "label": ("bugs", "fruit")}


@dataclass
class Oracle:
    """Knows the text of every picture by its pixels, and embeds a text as a random vector of its own."""

    known: dict[bytes, str] = field(default_factory=dict)
    training: bool = True
    calls: list[str] = field(default_factory=list)
    objectives: dict[str, Objective] = field(default_factory=lambda: {"lm": LM()})
    named_layers: dict[str, object] = field(default_factory=dict)

    def learn(self, pictures: PictureSet, texts: Sequence[str]) -> None:
        for i, text in enumerate(texts):
            self.known[pictures.frames([i])[0].numpy().tobytes()] = text

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def eval(self) -> None:
        self.training = False

    def texts_of(self, frames: Tensor) -> list[str]:
        return [self.known[frame.numpy().tobytes()] for frame in frames]

    def encode_visual(self, frames: Tensor) -> Tensor:
        self.calls.append(f"visual {len(frames)}")
        return torch.stack([embedding(text) for text in self.texts_of(frames)])

    def encode_text(self, token_ids: Tensor) -> Tensor:
        return torch.stack([embedding(TOKENIZER.decode(ids)) for ids in token_ids.tolist()])


class OracleEncoder(Encoder):
    """An encoder whose heads know the answers."""

    def predict(
        self,
        objective: str,
        pictures: PictureSet,
        texts: Sequence[str] = (),
        candidates: Tensor | None = None,
    ) -> Tensor:
        own = cast(Oracle, self.chain).texts_of(pictures.frames(range(len(pictures))))
        assert objective == "vlm"
        assert candidates is not None
        names = [TOKENIZER.decode(ids) for ids in TOKENIZER.encode(texts, MODEL.text_length).tolist()]
        rows = zip(own, candidates.tolist(), strict=True)
        return torch.tensor([[10.0 if names[j] == text else -10.0 for j in chosen] for text, chosen in rows])

    def generate(self, objective: str, pictures: PictureSet, search: SearchOptions, texts: Sequence[str]) -> Tensor:
        assert objective == "lm" and not texts
        own = cast(Oracle, self.chain).texts_of(pictures.frames(range(len(pictures))))
        return torch.from_numpy(TOKENIZER.encode(own, MODEL.text_length))[:, 1:]


def embedding(text: str) -> Tensor:
    seed = int.from_bytes(text.encode()[-6:].rjust(6, b" "), "big") + len(text)
    vector = np.random.default_rng(seed).standard_normal(64)
    return torch.tensor(vector / np.linalg.norm(vector), dtype=torch.float32)


def oracle_for(where: dict[str, tuple[str, ...]], by: str) -> tuple[Oracle, PictureSet]:
    pictures = PictureSet("emoji", "image", where, MODEL.inputs, 4096)
    oracle = Oracle()
    names = [TOKENIZER.decode(ids) for ids in TOKENIZER.encode(pictures.captions, MODEL.text_length).tolist()]
    oracle.learn(pictures, names if by == "name" else [str(sample.label) for sample in pictures.samples])
    return oracle, pictures


def encoder_for(oracle: Oracle, gather: Gather | None = None) -> Encoder:
    return OracleEncoder(
        cast(Chain, oracle), MODEL, TOKENIZER, gather or LocalGather(), torch.device("cpu"), batch_size=8
    )


def test_an_oracle_retrieves_everything_both_ways_and_keeps_training_mode() -> None:
    oracle, pictures = oracle_for(WHERE, "name")
    task = RetrievalTask(where=WHERE, rerank=4, gallery=2, baseline=BaselineReference(where={"style": ("twemoji",)}))
    result = run_tasks([task], encoder_for(oracle))[0]
    assert oracle.training
    assert [score.value for score in result.scores] == [1.0] * 16, "also the median ranks"
    assert [score.metric for score in result.scores[-5:]] == [
        "image->text, re-ranked median rank",
        *(f"text->image, re-ranked {figure}" for figure in ("R@1", "R@5", "R@10", "median rank")),
    ]
    assert result.scores[0].chance == pytest.approx(1 / len(pictures))
    # The baseline is given the very same pictures: it must find each.
    assert [score.baseline for score in result.scores[:8]] == [1.0] * 8
    assert [gallery.title for gallery in result.galleries] == ["retrieval: image to text", "retrieval: text to image"]
    assert all(row.correct[0] and not any(row.correct[1:]) for row in result.galleries[0].rows)
    assert result.galleries[1].rows[0].answer_images[0].startswith("data:image/png;base64,")


def test_reranking_mends_a_wrong_contrastive_order_among_its_candidates_only() -> None:
    oracle, pictures = oracle_for(WHERE, "name")
    wrong = oracle.texts_of(pictures.frames(range(len(pictures))))
    shifted = dict(zip(oracle.known, wrong[1:] + wrong[:1], strict=True))

    def confused(frames: Tensor) -> Tensor:
        # Nearest to a neighbour's name, second nearest to the own one.
        own = [embedding(text) for text in oracle.texts_of(frames)]
        other = [embedding(shifted[frame.numpy().tobytes()]) for frame in frames]
        return torch.nn.functional.normalize(0.6 * torch.stack(own) + 0.8 * torch.stack(other), dim=-1)

    oracle.encode_visual = confused  # type: ignore[method-assign]
    scores = {
        s.metric: s.value for s in run_tasks([RetrievalTask(where=WHERE, rerank=5)], encoder_for(oracle))[0].scores
    }
    for way in ("image->text", "text->image"):
        assert scores[f"{way} R@1"] < 0.1
        assert scores[f"{way}, re-ranked R@1"] > 0.9
        assert scores[f"{way}, re-ranked R@10"] >= scores[f"{way} R@10"]
        assert scores[f"{way}, re-ranked median rank"] == 1.0 < scores[f"{way} median rank"]


@pytest.mark.parametrize(
    "task",
    [
        RetrievalTask(where=WHERE, rerank=3, gallery=4, baseline=BaselineReference(where={"style": ("fluent",)})),
        RetrievalTask(where=WHERE, text="tags", gallery=2),
        ZeroShotTask(where=WHERE, baseline=BaselineReference(where={"style": ("fluent",)})),
    ],
)
def test_blocks_change_no_figure(task: RetrievalTask | ZeroShotTask, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, _ = oracle_for(WHERE, "name")
    whole = run_tasks([task], encoder_for(oracle))[0]
    for module in (recall, retrieval, zero_shot):
        monkeypatch.setattr(module, "LARGEST_BLOCK", 1000)
    assert run_tasks([task], encoder_for(oracle))[0] == whole


def test_zero_shot_by_labels_and_chance() -> None:
    oracle, pictures = oracle_for(WHERE, "label")
    task = ZeroShotTask(where=WHERE, baseline=BaselineReference(where={"style": ("twemoji",)}))
    (score,) = run_tasks([task], encoder_for(oracle))[0].scores
    assert (score.value, score.chance, score.baseline, score.count) == (1.0, 0.5, 1.0, len(pictures))


def test_retrieval_takes_the_five_captions_of_each_picture() -> None:
    """Two pictures with five captions each, of which they share one. Right answers by hand; ranks by an oracle."""
    captions = [[f"a{i}" for i in range(4)] + ["both"], ["both"] + [f"b{i}" for i in range(4)]]
    pictures = PictureSet("emoji", "image", WHERE, MODEL.inputs, 2)
    pictures.samples = [replace(sample, captions=own) for sample, own in zip(pictures.samples, captions, strict=True)]
    assert pictures.captions == ["a0", "both"]
    texts, relevant = _texts_and_relevance(pictures, RetrievalTask(text="captions"))
    assert texts == ["a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3", "both"]
    assert relevant.rows(slice(None)).astype(int).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1, 1]]
    assert _texts_and_relevance(pictures, RetrievalTask())[1].rows(slice(None)).astype(int).tolist() == [[1, 0], [0, 1]]
    # Picture 0 finds a foreign text first and its own second; picture 1 its last caption first. Of the nine texts the
    # four of picture 0 but the first find it, and all of picture 1.
    similarity = np.array([[0.0, 0.8, 0.8, 0.8, 0.9, 0.1, 0.1, 0.1, 0.1], [0.5, 0.0, 0, 0, 0.95, 0.5, 0.5, 0.96, 0.5]])
    to_text, to_picture = ranks_both_ways(lambda part: similarity[part], relevant)
    assert to_text.tolist() == [2, 1]
    assert to_picture.tolist() == [2, *[1] * 8]


def test_folds_are_ranked_by_themselves() -> None:
    """Pictures in pairs; each picture is most alike the text of the one two places later, in another fold."""
    where = {"style": ("twemoji",), "label": ("bugs",)}
    oracle, pictures = oracle_for(where, "name")
    count = len(pictures) // 2 * 2
    own = oracle.texts_of(pictures.frames(range(count)))
    later = dict(zip(list(oracle.known)[:count], own[2:] + own[:2], strict=True))

    def confused(frames: Tensor) -> Tensor:
        right = torch.stack([embedding(text) for text in oracle.texts_of(frames)])
        wrong = torch.stack([embedding(later[frame.numpy().tobytes()]) for frame in frames])
        return torch.nn.functional.normalize(0.6 * right + 0.8 * wrong, dim=-1)

    oracle.encode_visual = confused  # type: ignore[method-assign]

    class FirstCaptions(RetrievalTask):
        def picture_set(self, encoder: Encoder) -> PictureSet:
            found = super().picture_set(encoder)
            found.samples = [replace(one, captions=(text,)) for one, text in zip(pictures.samples, own, strict=False)]
            return found

    task = FirstCaptions(where=where, max_samples=count, folds=2, rerank=2, text="captions")
    (result,) = run_tasks([task], encoder_for(oracle))
    scores = {score.metric: score for score in result.scores}
    assert len(scores) == 32, "four figures, both ways, twice ranked, whole and in folds"
    for way in ("image->text", "text->image"):
        assert scores[f"{way} R@1"].value < 0.1
        assert scores[f"{way}, folds of 2 R@1"].value == 1.0
        assert scores[f"{way}, re-ranked, folds of 2 R@1"].value == 1.0
        assert scores[f"{way}, folds of 2 R@1"].chance == 0.5
        assert scores[f"{way}, folds of 2 R@1"].count == count
    with pytest.raises(DataError, match=f"{count} pictures cannot be cut into folds of {count - 1}; give a multiple"):
        run_tasks([replace(task, folds=count - 1)], encoder_for(oracle))


@pytest.mark.parametrize(("texts", "count"), [(1, 1), (3, 2), (9, 4), (2, 5)])
def test_pairs_of_texts_with_pictures_are_predicted_by_picture(texts: int, count: int) -> None:
    pictures = PictureSet("emoji", "image", WHERE, MODEL.inputs, 5)
    names = [f"text {place}" for place in range(texts)]
    random = torch.Generator().manual_seed(texts)
    candidates = torch.stack([torch.randperm(5, generator=random)[:count] for _ in names])
    keys = [sample.key for sample in pictures.samples]
    asked = []

    class Numbering(OracleEncoder):
        def predict(
            self, objective: str, pictures: PictureSet, texts: Sequence[str] = (), candidates: Tensor | None = None
        ) -> Tensor:
            assert candidates is not None
            asked.append(candidates.numel())
            own = torch.tensor([keys.index(sample.key) for sample in pictures.samples])
            return (own[:, None] * 100 + candidates).float()

    encoder = Numbering(cast(Chain, Oracle()), MODEL, TOKENIZER, LocalGather(), torch.device("cpu"))
    found = matching_of_texts(encoder, "vlm", pictures, names, candidates)
    assert torch.equal(found, (candidates * 100 + torch.arange(texts)[:, None]).float())
    (pairs,) = asked
    assert pairs <= 2 * texts * count + count, "little beside the pairs themselves"


@pytest.mark.parametrize(("task", "by"), [(RetrievalTask(where=WHERE), "name"), (ZeroShotTask(where=WHERE), "label")])
def test_of_several_embeddings_of_a_picture_the_most_alike_counts(task: RetrievalTask | ZeroShotTask, by: str) -> None:
    oracle, _ = oracle_for(WHERE, by)
    single = oracle.encode_visual
    # Their mean, or either end, is of no use.
    oracle.encode_visual = lambda frames: torch.stack(  # type: ignore[method-assign]
        [-single(frames), single(frames), -2.0 * single(frames)], dim=1
    )
    assert {score.value for score in run_tasks([task], encoder_for(oracle))[0].scores} == {1.0}


def test_captions_of_an_oracle_match_exactly() -> None:
    oracle, _ = oracle_for(WHERE, "name")
    result = run_tasks([CaptionTask(where=WHERE, gallery=3)], encoder_for(oracle))[0]
    values = {score.metric: score.value for score in result.scores}
    assert values["keyword F1"] == 1.0
    assert values["exact match"] == 1.0
    assert len(result.galleries[0].examples) == 3


@pytest.mark.parametrize(
    "spelled", [str.upper, str.title, lambda text: text.replace(" ", "\n "), lambda text: f"{text} "]
)
def test_captions_match_in_any_spelling(spelled: Callable[[str], str]) -> None:
    @dataclass(frozen=True)
    class Spelled(CaptionTask):
        def picture_set(self, encoder: Encoder) -> PictureSet:
            pictures = super().picture_set(encoder)
            pictures.samples = [
                replace(sample, captions=tuple(map(spelled, sample.captions))) for sample in pictures.samples
            ]
            return pictures

    oracle, _ = oracle_for(WHERE, "name")
    result = run_tasks([Spelled(where=WHERE)], encoder_for(oracle))[0]
    plain = run_tasks([CaptionTask(where=WHERE)], encoder_for(oracle))[0]
    assert [score.value for score in result.scores] == [score.value for score in plain.scores]
    assert result.scores[0].value == 1.0


class Replica:
    """One of several replicas that are run one after the other; what each joins is put together afterwards."""

    def __init__(self, replica: int, replicas: int) -> None:
        self.replica, self.replicas = replica, replicas

    def join(self, tensor: Tensor) -> Tensor:
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        return tensor


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 7, 16])
def test_shares_join_to_all_in_order_in_equal_batches(count: int, replicas: int) -> None:
    shares = [list(shared_batches(count, 3, Replica(r, replicas))) for r in range(replicas)]
    joined = [i for share in shares for batch in share for i in batch]
    assert joined[:count] == list(range(count))
    assert len({tuple(len(batch) for batch in share) for share in shares}) == 1


def test_an_empty_choice_names_the_filter() -> None:
    with pytest.raises(DataError, match="style in"):
        PictureSet("emoji", "image", {"style": ("oil painting",)}, MODEL.inputs, 10)


def test_tags_are_relevant_to_every_picture_that_has_them() -> None:
    oracle, _ = oracle_for({"style": ("twemoji",), "label": ("bugs",)}, "name")
    task = RetrievalTask(where={"style": ("twemoji",), "label": ("bugs",)}, text="tags", min_tagged=2)
    scores = run_tasks([task], encoder_for(oracle))[0].scores
    # Every picture of the subgroup has the tag "bug" or "insect": chance must count several right answers.
    assert scores[4].metric == "text->image R@1"
    assert scores[4].chance is not None
    assert scores[4].chance > 1 / scores[0].count


def test_official_scores_of_captions_stand_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of captions that are the references; what a machine cannot compute is refused before anything is written."""
    pytest.importorskip("pycocoevalcap", reason="the extra 'tasks' is not installed")
    monkeypatch.setenv("PATH", "/nowhere")  # without java: the plain tokenizer, and neither METEOR nor SPICE
    oracle = Oracle()
    pictures = PictureSet("emoji", "image", WHERE, MODEL.inputs, 12)
    oracle.learn(pictures, pictures.captions)
    task = CaptionTask(where=WHERE, max_samples=12, official=("ROUGE-L", "CIDEr-D"))
    scores = {score.metric: score for score in run_tasks([task], encoder_for(oracle))[0].scores}
    assert scores["ROUGE-L, official"].value == 1.0
    cider = scores["CIDEr-D, official"]
    assert cider.value > 1 and not cider.graded and cider.interval is not None
    with pytest.raises(UserError, match="task caption: METEOR cannot be computed: needs java"):
        run_tasks([replace(task, official=("METEOR",))], encoder_for(oracle))


def test_captions_by_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    """NoCaps' figures: each domain is a set of its own, with document frequencies of its own."""
    pytest.importorskip("pycocoevalcap", reason="the extra 'tasks' is not installed")
    monkeypatch.setenv("PATH", "/nowhere")  # the plain tokenizer
    domains = ("in-domain", "near-domain", "near-domain", "out-domain")

    class Domains(CaptionTask):
        def picture_set(self, encoder: Encoder) -> PictureSet:
            found = super().picture_set(encoder)
            found.samples = [
                replace(one, meta={**one.meta, "domain": domains[place % 4]}) for place, one in enumerate(found.samples)
            ]
            return found

    task = Domains(where=WHERE, max_samples=12, official=("CIDEr-D",), by="domain")
    oracle, _ = oracle_for(WHERE, "name")
    pictures = PictureSet("emoji", "image", WHERE, MODEL.inputs, 12)
    own = oracle.texts_of(pictures.frames(range(12)))
    # Wrong in the first domain, right in the second, of the third what stands at 3 and 11 but not at 7.
    wrong = [own[place] if place % 4 in (1, 2) or place in (3, 11) else "nothing" for place in range(12)]
    oracle.learn(pictures, wrong)
    scores = {score.metric: score for score in run_tasks([task], encoder_for(oracle))[0].scores}
    whole = ("exact match", "keyword F1", "BLEU-4", "CIDEr-D, official")
    assert scores.keys() == {*whole, *(f"{name}, {one}" for name in whole for one in domains)}
    assert [scores[f"exact match, {one}"].value for one in sorted(set(domains))] == [0.0, 1.0, pytest.approx(2 / 3)]
    assert [scores[f"exact match{of}"].count for of in ("", *(f", {one}" for one in sorted(set(domains))))] == [
        12,
        3,
        6,
        3,
    ]
    assert scores["BLEU-4, in-domain"].value == 0.0 and not scores["CIDEr-D, official, out-domain"].graded
    near = [place for place in range(12) if domains[place % 4] == "near-domain"]
    alone = caption_scores([wrong[i] for i in near], [pictures.all_captions[i] for i in near], ["CIDEr-D"])
    assert scores["CIDEr-D, official, near-domain"].value == pytest.approx(alone.values["CIDEr-D"])
    among = caption_scores(wrong, pictures.all_captions, ["CIDEr-D"]).each["CIDEr-D"][near].mean()
    assert alone.values["CIDEr-D"] != pytest.approx(among), "not the domain's part of the whole"


def test_captions_by_an_objective_that_writes_none_are_refused() -> None:
    oracle, pictures = oracle_for(WHERE, "name")
    with pytest.raises(UserError) as caught:
        write_captions(pictures, encoder_for(oracle), "vlm", num_beams=1)
    assert str(caught.value) == (
        "captions: got the objective 'vlm'; allowed are those of the stage that write ('lm'); name one of them, or use "
        "a stage that trains it"
    )
