"""Embeddings and predictions of whole sets, computed in shares by all replicas.

Shapes: N pictures or texts, K texts of each picture, M embeddings of a picture, P projection
size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omnivl.architectures import Architecture
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather, together
from omnivl.chain.objective import Writing
from omnivl.chain.pictures import Pictures
from omnivl.data.tokenizer import TextReader, Tokenizer
from omnivl.errors import UserError
from omnivl.inference.draw import draw, noise_shape, starting_noise
from omnivl.inference.generate import generate
from omnivl.inference.pictures import PictureSet, shared_batches
from omnivl.inference.predict import predict
from omnivl.inference.rank import rank_answers
from omnivl.inference.search import SearchOptions


@dataclass(frozen=True)
class Encoder:
    """A trained chain with everything that its inputs need. Results are on the CPU and equal on every replica.

    Attributes:
        chain: The chain in evaluation mode, on ``device``.
        model: Configuration of the chain.
        tokenizer: Turns texts into ids.
        gather: Joins the replicas' shares.
        device: Device of the chain.
        batch_size: Samples per forward pass and replica.
        readers: Text readers of stacks that do not read the batch's ``token_ids``, by stack.
        decodes_on: The GPU that decodes what the model is shown; None for the CPU.
    """

    chain: Chain
    model: Architecture
    tokenizer: Tokenizer
    gather: Gather
    device: torch.device
    batch_size: int = 64
    readers: Mapping[str, TextReader] = field(default_factory=dict)
    decodes_on: str | None = None

    @property
    def most_texts(self) -> int:
        """Texts per forward pass and replica; more only where one picture has more of its own."""
        return 4 * self.batch_size

    @property
    def reader(self) -> TextReader:
        """What the chain reads texts with."""
        return TextReader(self.tokenizer, self.model.inputs.text_length)

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """int64 ``[len(texts), L]`` on the device."""
        return torch.from_numpy(self.reader.encode(texts)).to(self.device)

    def pictures(self, pictures: PictureSet) -> Tensor:
        """L2-normalised embeddings of pictures or clips, fp32 ``[N, P]``, or ``[N, M, P]`` if each has several."""
        return self.in_shares(
            len(pictures), self.batch_size, lambda share: self.chain.encode_visual(self.shown(pictures, share))
        )

    def texts(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised embeddings of texts, fp32 ``[N, P]``."""
        return self.in_shares(
            len(texts),
            self.most_texts,
            lambda share: self.chain.encode_text(self.token_ids([texts[i] for i in share])),
        )

    def predict(
        self, objective: str, pictures: PictureSet, texts: Sequence[str] = (), candidates: Tensor | None = None
    ) -> Tensor:
        """Predictions of an objective's head for each picture, or for each picture with each of its texts.

        Args:
            objective: Key of the objective, such as ``vlm``.
            pictures: N pictures or clips.
            texts: Texts to predict with; none for heads that read pictures alone.
            candidates: int64 ``[N, K]``, the texts of each picture as indices into ``texts``; None: text i belongs to
                picture i alone.

        Returns:
            ``[N, ...]``, or ``[N, K, ...]`` with ``candidates``; see ``omnivl.inference.predict.predict``.

        Raises:
            UserError: The chain has no such objective, or it predicts nothing.
        """

        def of_share(share: list[int]) -> Tensor:
            frames = self.shown(pictures, share)
            if not texts:
                return predict(self.chain, objective, frames)
            if candidates is None:
                return predict(self.chain, objective, frames, self.token_ids([texts[i] for i in share]))
            chosen = self.token_ids([texts[j] for i in share for j in candidates[i].tolist()])
            rows = torch.arange(len(share), device=self.device).repeat_interleave(candidates.shape[1])
            found = predict(self.chain, objective, frames, chosen, rows)
            return found.view(*candidates[share].shape, *found.shape[1:])

        each = 1 if candidates is None else candidates.shape[1]
        size = max(1, min(self.batch_size // 4, self.most_texts // each)) if texts else self.batch_size
        return self.in_shares(len(pictures), size, of_share)

    def generate(
        self, objective: str, pictures: PictureSet, search: SearchOptions, texts: Sequence[str] = ()
    ) -> Tensor:
        """The text that an objective's head generates for each picture, int64 ``[N, search.max_length]``.

        Args:
            objective: Key of an objective that predicts the next token, such as ``lm``.
            pictures: N pictures or clips.
            search: How to search.
            texts: A text for each picture, such as a question, if the objective's decoder attends to one.

        Raises:
            UserError: The chain has no such objective, or it predicts nothing.
        """

        def of_share(share: list[int]) -> Tensor:
            frames, beside = self.shown(pictures, share), self.token_ids([texts[i] for i in share]) if texts else None
            return generate(self.chain, objective, frames, search, token_ids=beside, gather=self.gather).token_ids

        return self.in_shares(len(pictures), self.batch_size, of_share)

    def draw(
        self,
        objective: str,
        texts: Sequence[str],
        *,
        seed: int = 0,
        beside: PictureSet | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """The picture that an objective's head draws for each text, uint8 ``[N, 3, H, W]``.

        Args:
            objective: Key of an objective of kind ``diffusion``.
            texts: N texts.
            seed: Of the noise that drawings start from.
            beside: N pictures of which parts are kept; None for none.
            kept: bool ``[N, patches]``, row by row, which patches of them are.

        Raises:
            UserError: The chain has no such objective.
        """
        shape = noise_shape(self.chain, objective)

        def of_share(share: list[int]) -> Tensor:
            ids, noise = self.token_ids([texts[i] for i in share]), starting_noise(share, shape, seed).to(self.device)
            if beside is None or kept is None:
                return draw(self.chain, objective, ids, noise)
            frames = self.squares(beside, share).to(self.device)
            return draw(self.chain, objective, ids, noise, frames, kept[share].to(self.device))

        return self.in_shares(len(texts), self.batch_size, of_share)

    def squares_embedded(self, pictures: Tensor) -> Tensor:
        """Embeddings of pictures in memory, uint8 ``[N, 3, H, W]`` on the CPU; see ``pictures``."""
        return self.in_shares(
            len(pictures),
            self.batch_size,
            lambda share: self.chain.encode_visual(pictures[share][:, None].to(self.device)),
        )

    def writing(self, objective: str) -> Writing:
        """How an objective generates texts.

        Args:
            objective: Its key.

        Raises:
            UserError: The chain has no such objective, or it writes no texts.
        """
        written = self.writings
        if objective not in written:
            raise UserError(
                f"captions: got the objective {objective!r}; allowed are those of the stage that write "
                f"({', '.join(map(repr, written)) or 'none'}); name one of them, or use a stage that trains it"
            )
        return written[objective]

    @property
    def writings(self) -> dict[str, Writing]:
        """How the objectives that generate texts do so, by their keys."""
        written = {key: one.writing(self.reader, self.readers) for key, one in self.chain.objectives.items()}
        return {key: one for key, one in written.items() if one is not None}

    def rank(
        self,
        objective: str,
        pictures: PictureSet,
        texts: Sequence[str],
        answers: Sequence[str],
        *,
        length: int,
        candidates: int = 128,
        first_token_twice: bool = False,
    ) -> Tensor:
        """Log probabilities of answers to a question about each picture, fp32 ``[N, len(answers)]``.

        Args:
            objective: Key of an objective that writes answers, such as ``answer``.
            pictures: N pictures or clips.
            texts: N questions.
            answers: Answers to choose from.
            length: Token positions of an answer; longer ones are cut.
            candidates: See ``rank_answers``.
            first_token_twice: See ``rank_answers``.

        Raises:
            UserError: The chain has no such objective, or it writes nothing.
        """
        ids = torch.from_numpy(self.tokenizer.encode(answers, length)).to(self.device)

        def of_share(share: list[int]) -> Tensor:
            frames, questions = self.shown(pictures, share), self.token_ids([texts[i] for i in share])
            return rank_answers(
                self.chain,
                objective,
                frames,
                questions,
                ids,
                self.tokenizer.special,
                candidates=candidates,
                first_token_twice=first_token_twice,
            )

        return self.in_shares(len(pictures), max(1, self.batch_size // 4), of_share)

    def in_shares(self, count: int, batch_size: int, of_share: Callable[[list[int]], Tensor]) -> Tensor:
        """Computes a tensor for ``count`` samples in shares by all replicas; see ``shared_batches``.

        Args:
            count: Number of samples.
            batch_size: Samples per call and replica.
            of_share: Maps indices of samples to ``[len(indices), ...]`` on the device.

        Returns:
            ``[count, ...]``.
        """
        parts = [of_share(share) for share in shared_batches(count, batch_size, self.gather)]
        return self.gather.join(torch.cat(parts))[:count].cpu()

    def squares(self, pictures: PictureSet, share: Sequence[int]) -> Tensor:
        """Decoded pictures of this replica's share as squares, uint8 ``[len(share), T, 3, S, S]``, on the CPU.

        Raises:
            DataError: One cannot be read.
            ReplicaError: Another replica cannot read one of its own.
        """
        return together(self.gather, self.device, lambda: pictures.frames(share))

    def shown(self, pictures: PictureSet, share: Sequence[int]) -> Tensor | Pictures:
        """What the model sees of this replica's share; raises as ``squares`` does."""
        return together(self.gather, self.device, lambda: pictures.shown(share, self.decodes_on)).to(self.device)
