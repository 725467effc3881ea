"""A small X-VLM, and batches of pictures with texts about regions for it."""

from collections.abc import Sequence

import numpy as np

from omnivl.architectures import XVLM
from omnivl.chain.preparation import Preparation, asked_fields
from omnivl.data.batch import Batch, DataKind
from omnivl.data.collate import Collator
from omnivl.data.example import Example
from omnivl.data.fields import Placed
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import TextReader
from omnivl.objectives import ITC, MLM, VLM, Locate, Objective
from omnivl.parts.sizes import Transformer

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=40, num_reserved=5)
BERT = Transformer(hidden_size=16, num_heads=2, layers=2, norm="post", norm_eps=1e-12)
CONFIG = XVLM(
    **{"vision": Transformer(hidden_size=24, num_heads=2, layers=2), "text": BERT, "fusion": BERT},
    **{"image_size": 8, "patch_size": 2, "text_length": 6, "vocab_size": 40, "projection_size": 8, "num_frames": 3},
)
REGIONS = 3
OBJECTIVES: tuple[Objective, ...] = (
    *(ITC(regions=REGIONS), VLM(regions=REGIONS, negatives="global", head="perceptron")),
    *(MLM(regions=REGIONS, probability=0.5), Locate(regions=REGIONS)),
)


class LetterTokenizer:
    """One token per letter."""

    special = TOKENS

    def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        rows = [[TOKENS.cls, *(5 + ord(letter) % 35 for letter in text), TOKENS.sep] for text in texts]
        return np.array([row + [TOKENS.pad] * (length - len(row)) for row in rows], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        raise AssertionError("not needed")


def examples(size: int, seed: int = 0, clips: bool = False) -> list[Example]:
    """Samples of which the first has no region, others up to five; the view hides some of them."""
    random, found = np.random.default_rng(seed), []
    for row in range(size):
        count = row % 6
        corners = np.sort(random.uniform(size=(count, 2, 2)), axis=1).reshape(count, 4)
        shown = random.uniform(size=count) < 0.8
        fields = {
            "regions": tuple("".join(random.choice(list("abcdefgh"), 1 + one % 4)) for one in range(count)),
            "region_boxes": Placed(corners * shown[:, None], shown),
        }
        pictures = random.integers(0, 256, (3 if clips else 1, 8, 8, 3), dtype=np.uint8)
        text = "".join(random.choice(list("abcdefgh"), 1 + row % 4))
        found.append(Example(pictures, text, row % 5, -1, seed * size + row, "shard:key", {}, fields))
    return found


def collated(
    samples: Sequence[Example], objectives: Sequence[Objective] = OBJECTIVES, kind: DataKind = "image_text"
) -> Batch:
    """A batch of samples with the objectives' draws."""
    readers = {"text": TextReader(LetterTokenizer(), CONFIG.text_length)}
    prepare = Preparation(tuple(objectives), TOKENS, CONFIG.inputs, seed=0, readers=readers)
    types = asked_fields(objectives, kind, "letters")
    return Collator(CONFIG.inputs, LetterTokenizer(), prepare).collate(samples, kind, "letters", 0, types)
