"""Embeddings of whole sets, computed in shares by all replicas."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.data.tokenizer import Tokenizer
from omnivl.parts.config import ModelConfig
from omnivl.tasks.pictures import PictureSet, shared_batches
from omnivl.tasks.pixel_baseline import pixel_features


@dataclass(frozen=True)
class Encoder:
    """A chain with what is needed to feed it.

    Attributes:
        chain: In evaluation mode, on ``device``.
        model: Its configuration.
        tokenizer: Turns texts into ids.
        gather: Joins the replicas' shares.
        device: Where the chain lives.
        batch_size: Samples per forward pass and replica.
    """

    chain: Chain
    model: ModelConfig
    tokenizer: Tokenizer
    gather: Gather
    device: torch.device
    batch_size: int = 64

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """int64 ``[len(texts), L]`` on the device."""
        return torch.from_numpy(self.tokenizer.encode(texts, self.model.text_length)).to(self.device)

    def pictures(self, pictures: PictureSet) -> Tensor:
        """L2-normalised embeddings fp32 ``[len(pictures), P]`` on the CPU, equal on every replica."""
        parts = []
        for indices in shared_batches(len(pictures), self.batch_size, self.gather):
            parts.append(self.chain.encode_visual(pictures.frames(indices).to(self.device)))
        return self._joined(parts, len(pictures))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised embeddings fp32 ``[len(texts), P]`` on the CPU, equal on every replica."""
        parts = []
        for indices in shared_batches(len(texts), 4 * self.batch_size, self.gather):
            parts.append(self.chain.encode_text(self.token_ids([texts[i] for i in indices])))
        return self._joined(parts, len(texts))

    def pixels(self, pictures: PictureSet, *, over_time: bool = False) -> Tensor:
        """What the pixel baseline compares, fp32 ``[len(pictures), values]`` on the CPU, equal on every replica.

        Args:
            pictures: Pictures or clips.
            over_time: Whether a clip is averaged to one picture, so that stills and clips can be compared.
        """
        parts = []
        for indices in shared_batches(len(pictures), self.batch_size, self.gather):
            frames = pictures.frames(indices)
            if over_time:
                frames = frames.float().mean(dim=1, keepdim=True).round().to(torch.uint8)
            parts.append(pixel_features(frames).to(self.device))
        return self._joined(parts, len(pictures))

    def match(self, pictures: PictureSet, texts: Sequence[str], candidates: Tensor) -> Tensor:
        """Matching logits of each picture with its candidate texts.

        Args:
            pictures: Q pictures.
            texts: All texts.
            candidates: int64 ``[Q, K]``, indices into ``texts``.

        Returns:
            fp32 ``[Q, K]`` on the CPU.
        """
        parts = []
        num_candidates = candidates.shape[1]
        for indices in shared_batches(len(pictures), max(1, self.batch_size // 4), self.gather):
            chosen = [texts[j] for i in indices for j in candidates[i].tolist()]
            memory_rows = torch.arange(len(indices), device=self.device).repeat_interleave(num_candidates)
            logits = self.chain.match(pictures.frames(indices).to(self.device), self.token_ids(chosen), memory_rows)
            parts.append(logits.view(len(indices), num_candidates))
        return self._joined(parts, len(pictures))

    def _joined(self, parts: Sequence[Tensor], count: int) -> Tensor:
        return self.gather.join(torch.cat(list(parts)).float())[:count].cpu()
