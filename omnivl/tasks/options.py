"""Choice among each sample's own options: answers and reasons (VCR), turns of a dialogue (VisDial)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moe.ranges import Range
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.patch_attention import PatchAttention, patch_attention
from omnivl.inference.pictures import PictureSet, Reads
from omnivl.objectives.choose import Choose
from omnivl.tasks.examples import Told
from omnivl.tasks.needs import Chooses, Need
from omnivl.tasks.predicting import Judged, Line, PredictingTask, likely
from omnivl.tasks.results import mean_score
from omnivl.tasks.sample_fields import place_of, texts_of
from omnivl.tasks.scorers.dialogue import answer_ranks, ndcg

_RELEVANCE = "relevance"


@dataclass(frozen=True)
class OptionsTask(PredictingTask):
    """How an objective of kind ``choose`` ranks each sample's options.

    Reported are accuracy, the mean reciprocal rank, R@5 and R@10 and the mean rank where there are more than 10
    options, NDCG of the samples that have ``relevance``, and with ``reasons`` VCR's three accuracies: answer, reason
    given the right answer, and both.

    Attributes:
        objective: Key of the objective that chooses; its options name the fields.
        source: As for every task; ``scenes`` has generated samples of many tasks.
        reasons: Key of a second objective that chooses among reasons, as VCR's rationales; null for none.
        answer: Field among what is ``given`` to the second objective, or in its ``context``, if any: the text of the
            answer that a reason is for. It is the right one in scores, and each option in turn in predictions.

    Source: Zellers et al., VCR, arXiv 1811.10830, section 6, and models/eval_q2ar.py of github.com/rowanz/r2c; for
        dialogues ``omnivl.tasks.scorers.dialogue``.
    Differs: of options with equal scores none is right, where VCR's program takes the first.
    """

    reads: ClassVar[Reads] = "media"
    lower_is_better: ClassVar[tuple[str, ...]] = ("mean rank",)
    right_means: ClassVar[str] = "the right option has the highest score and no equal"

    kind: Literal["options"] = "options"
    objective: str = "choose"
    source: str = "scenes"
    max_samples: Annotated[int, Range(1)] = 512
    reasons: str | None = None
    answer: str = "answer"

    @property
    def needs(self) -> tuple[Need, ...]:
        """The heads that choose."""
        keys = [self.objective, *([] if self.reasons is None else [self.reasons])]
        return tuple(Chooses(key, (Choose,)) for key in keys)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return ("accuracy", "mean reciprocal rank", "R@*", "mean rank", "NDCG", "reason given the right answer", "both")

    @property
    def predicts(self) -> tuple[str, ...]:
        """See ``PredictingTask``."""
        return ("option", "scores", *(("reason", "reason_scores") if self.reasons is not None else ()))

    def predict(self, pictures: PictureSet, encoder: Encoder) -> Sequence[Line]:
        """See ``PredictingTask``: ``scores`` of the options ``[K]``, and the index of the best ``option``.

        With ``reasons`` also ``reason_scores``, a list for each option as the answer, and the index of the best
        ``reason`` for the best option; without ``predictions`` only what scores need, once the answer is known.

        Raises:
            DataError: A sample lacks options, or samples have different numbers of them.
        """
        options = _options(self.objective, pictures, encoder)
        scores = _scores(self.objective, pictures, options, encoder)
        found: list[dict[str, Any]] = [{"option": int(one.argmax()), "scores": one} for one in scores]
        if self.reasons is not None and self.predictions:
            for line, reasons in zip(found, self._reasons(self.reasons, pictures, options, encoder), strict=True):
                line |= {"reason": int(reasons[line["option"]].argmax()), "reason_scores": reasons}
        return found

    def truth(self, pictures: PictureSet, encoder: Encoder) -> list[dict[str, int]]:
        """See ``PredictingTask``: the indices of the right ``option``, and with ``reasons`` of the right ``reason``."""
        found = [{"option": place} for place in _right(self.objective, pictures, encoder)]
        if self.reasons is not None:
            for line, place in zip(found, _right(self.reasons, pictures, encoder), strict=True):
                line["reason"] = place
        return found

    def judge(
        self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[dict[str, int]], encoder: Encoder
    ) -> Judged:
        """See ``PredictingTask``; each has the ``rank`` of the right option, with ``reasons`` also ``reason_right``.

        Ties count against the model: an option that is chosen with the score of another one is not right.
        """
        options = _options(self.objective, pictures, encoder)
        scores, right = np.stack([one["scores"] for one in predicted]), [one["option"] for one in truth]
        ranks, count = answer_ranks(scores, right), scores.shape[1]
        hits = ranks == 1
        guessed = float(np.mean(1 / np.arange(1, count + 1)))
        found = [
            mean_score(self.name, "accuracy", hits, chance=1 / count),
            mean_score(self.name, "mean reciprocal rank", 1 / ranks, chance=guessed),
        ]
        for most in (5, 10):
            if count > most:
                found.append(mean_score(self.name, f"R@{most}", ranks <= most, chance=most / count))
        found.append(mean_score(self.name, "mean rank", ranks, chance=(count + 1) / 2, graded=False))
        dense = [place for place, sample in enumerate(pictures.samples) if _RELEVANCE in sample.meta]
        if dense:
            relevance = np.array([pictures.samples[place].meta[_RELEVANCE] for place in dense], dtype=np.float64)
            found.append(mean_score(self.name, "NDCG", ndcg(scores[dense], relevance)))
        each: list[dict[str, Any]] = [{"rank": rank, "right": rank == 1} for rank in ranks.tolist()]
        if self.reasons is not None:
            answers = [own[place] for own, place in zip(options, right, strict=True)]
            explained = self._explained(self.reasons, pictures, predicted, truth, answers, encoder)
            found += [
                mean_score(self.name, "reason given the right answer", explained[0], chance=1 / explained[1]),
                mean_score(self.name, "both", hits & explained[0]),
            ]
            for line, hit in zip(each, explained[0].tolist(), strict=True):
                line["reason_right"] = hit
        return Judged(tuple(found), each)

    def told(
        self, pictures: PictureSet, place: int, found: Line, truth: dict[str, int], own: Line, encoder: Encoder
    ) -> Told:
        """See ``PredictingTask``: the texts of the options, and with ``reasons`` what was said of the reason."""
        (options,) = _options(self.objective, pictures.chosen([place]), encoder)
        scores = torch.from_numpy(found["scores"])[None]
        share = float(_chooses(self.objective, encoder).probabilities(scores)[0, found["option"]])
        parts = [f"{likely(share)} among {len(options)} options", f"rank of the right one {own['rank']}"]
        if "reason_right" in own:
            parts.append(f"reason given the right answer {'right' if own['reason_right'] else 'wrong'}")
        return Told(options[found["option"]], options[truth["option"]], ", ".join(parts))

    def attention(
        self, pictures: PictureSet, places: Sequence[int], predicted: Sequence[Line], encoder: Encoder
    ) -> PatchAttention | None:
        """See ``PredictingTask``: of the text with the chosen option."""
        objective, chosen, texts = _chooses(self.objective, encoder), pictures.chosen(places), []
        options = _options(self.objective, chosen, encoder)
        for place, sample, caption, own in zip(places, chosen.samples, chosen.captions, options, strict=True):
            texts += objective.texts(caption, [own[predicted[place]["option"]]], encoder.reader, sample.meta)
        return patch_attention(encoder, self.objective, chosen, texts)

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has a text; what else it needs depends on the objective."""
        _ = pictures.captions

    def _reasons(
        self, key: str, pictures: PictureSet, given: Sequence[Sequence[str]], encoder: Encoder
    ) -> NDArray[np.float64]:
        """Scores of K reasons for each of A answers to each sample.

        Args:
            key: Of the objective.
            pictures: N samples.
            given: A answers of each.
            encoder: The trained stage.

        Returns:
            ``[N, A, K]``; the same for all answers where the objective does not read them.
        """
        reasons, columns = _options(key, pictures, encoder), [*zip(*given, strict=True)]
        if self.answer not in _chooses(key, encoder).beside:
            return np.stack([_scores(key, pictures, reasons, encoder)] * len(columns), axis=1)
        answers = ([{self.answer: answer} for answer in column] for column in columns)
        return np.stack([_scores(key, pictures, reasons, encoder, column) for column in answers], axis=1)

    def _explained(
        self,
        key: str,
        pictures: PictureSet,
        predicted: Sequence[Line],
        truth: Sequence[dict[str, int]],
        answers: Sequence[str],
        encoder: Encoder,
    ) -> tuple[NDArray[np.bool_], int]:
        """Whether the right reason for each of the right answers is found, ``[N]``, and among how many."""
        if self.predictions:
            scores = np.stack([one["reason_scores"][own["option"]] for one, own in zip(predicted, truth, strict=True)])
        else:
            scores = self._reasons(key, pictures, [[answer] for answer in answers], encoder)[:, 0]
        return answer_ranks(scores, [one["reason"] for one in truth]) == 1, scores.shape[1]


def _chooses(key: str, encoder: Encoder) -> Choose:
    """The objective of that key."""
    objective = encoder.chain.objectives[key]
    assert isinstance(objective, Choose), "as needs says"
    return objective


def _options(key: str, pictures: PictureSet, encoder: Encoder) -> list[list[str]]:
    """The options of each sample among which an objective chooses, equally many.

    Raises:
        DataError: A sample lacks options, or has another number of them than the first.
    """
    field = _chooses(key, encoder).field
    found = [texts_of(sample, field) for sample in pictures.samples]
    count = len(found[0])
    for sample, own in zip(pictures.samples, found, strict=True):
        if len(own) != count:
            raise DataError(f"{sample.where} has {len(own)} options; allowed: {count}, as the first sample has")
    return found


def _right(key: str, pictures: PictureSet, encoder: Encoder) -> list[int]:
    """The index of the right one of the options of each sample."""
    index, options = _chooses(key, encoder).index, _options(key, pictures, encoder)
    return [place_of(sample, index, own) for sample, own in zip(pictures.samples, options, strict=True)]


def _scores(
    key: str,
    pictures: PictureSet,
    options: Sequence[Sequence[str]],
    encoder: Encoder,
    instead: Sequence[Mapping[str, object]] | None = None,
) -> NDArray[np.float64]:
    """Scores of the options of each sample ``[N, K]``.

    Args:
        key: Of the objective.
        pictures: N samples.
        options: K of each, from ``_options``.
        encoder: The trained stage.
        instead: Fields that each sample is taken to have instead of its own.
    """
    objective, texts = _chooses(key, encoder), list[str]()
    for place, (sample, caption) in enumerate(zip(pictures.samples, pictures.captions, strict=True)):
        fields = {**sample.meta, **(instead[place] if instead is not None else {})}
        texts += objective.texts(caption, options[place], encoder.reader, fields)
    candidates = torch.arange(len(texts)).view(len(pictures), -1)
    return encoder.predict(key, pictures, texts, candidates).double().numpy()
