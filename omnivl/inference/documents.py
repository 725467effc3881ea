"""How likely answers are at the end of documents with pictures at their places.

Shapes: N documents, A answers.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from omnivl.chain.chain import visual_layout
from omnivl.chain.layout import lay_out
from omnivl.chain.pictures import Pictures
from omnivl.chain.state import State
from omnivl.data.documents import END, read_document
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.inference.predict import asked
from omnivl.objectives.interleaved_lm import InterleavedLM
from omnivl.objectives.prefix_lm import STREAM


def answer_log_probabilities(
    key: str, documents: PictureSet, texts: Sequence[str], answers: Sequence[str], encoder: Encoder
) -> Tensor:
    """The logarithm of the probability that each document goes on with each answer and its end, fp32 ``[N, A]``.

    Args:
        key: Of an objective of kind ``interleaved_lm``.
        documents: N sets of pictures.
        texts: Their texts, with a mark for each picture.
        answers: A answers.
        encoder: A stage with the objective, in evaluation mode and without gradients.

    Raises:
        DataError: A document with an answer is longer than the model's texts.
    """
    objective, reader = encoder.chain.objectives[key], encoder.readers[STREAM]
    assert isinstance(objective, InterleavedLM), "as needs says"
    begun = [len(read_document(text, reader).ids) for text in texts]  # tokens before the answer
    whole = [[read_document(f"{text} {answer}{END}", reader) for answer in answers] for text in texts]
    for sample, own in zip(documents.samples, whole, strict=True):
        if (most := max(len(one.ids) for one in own)) > reader.length:
            raise DataError(
                f"the text of {sample.where} with an answer has {most} tokens; allowed: {reader.length}, "
                "model.language.length; lower shots, shorten example and query, or raise it"
            )

    def of_share(share: list[int]) -> Tensor:
        pictures = Pictures.of(encoder.shown(documents, share))
        shown = visual_layout(pictures)
        count = len(share) * len(answers)
        layout = lay_out({key: asked(encoder.chain, key, shown.kind, count)}, shown.kind, count, 1, "predict")
        layout = replace(layout, visual=shown.visual, num_frames=shown.num_frames)
        rows = [one for place in share for one in whole[place]]
        given = [begun[place] for place in share for _ in answers]
        fields = {name: one.to(encoder.device) for name, one in objective.rows(rows, reader, given).items()}
        fields["join/rows"] = torch.arange(len(share), device=encoder.device).repeat_interleave(len(answers))
        state = encoder.chain.fold(State({**pictures.fields, **fields}, layout))
        return state[f"{key}/prediction"].view(len(share), len(answers))

    size = max(1, min(encoder.batch_size // 4, encoder.most_texts // len(answers)))
    return encoder.in_shares(len(texts), size, of_share)
