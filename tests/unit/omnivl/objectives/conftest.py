import pytest
import torch

from omnivl.data.batch import Batch, DataKind, is_video
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import PrepareContext

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=29, vocab_size=30, num_reserved=5)


@pytest.fixture
def tokens() -> SpecialTokens:
    return TOKENS


@pytest.fixture
def context() -> PrepareContext:
    return PrepareContext(seed=7, source="emoji", tokens=TOKENS, grid=(4, 4), step=0)


@pytest.fixture
def make_batch():
    def make(kind: DataKind = "image_text", positions: tuple[int, ...] = (0, 1, 2), num_frames: int = 8) -> Batch:
        size, random = len(positions), torch.Generator().manual_seed(0)
        times = num_frames if is_video(kind) else 1
        token_ids = torch.tensor([[1, 5 + p % 20, 7, 8, 9, 2, 0, 0] for p in positions])
        return Batch(
            kind=kind,
            frames=torch.randint(0, 256, (size, times, 3, 8, 8), dtype=torch.uint8, generator=random),
            token_ids=token_ids,
            identity=torch.tensor(positions),
            label=torch.full((size,), -1),
            position=torch.tensor(positions),
        )

    return make
