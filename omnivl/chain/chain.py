"""The chain: the model with its objectives as a list of layers that pass a ``State`` on.

    Embed -> VisualBlock * n -> VisualNorm -> TextBlock * n -> Project -> JoinRows -> AlignmentBlock * n
          -> GenerationBlock * n -> Losses

or, with one transformer for all tokens, which is run twice,

    Embed -> UnifiedLayer * n -> UnifiedNorm -> Project -> JoinRows -> UnifiedLayer * n -> UnifiedNorm -> Losses

``for layer in chain.program: state = layer(state)`` is the whole forward pass. The plain host runs it, ZeRO wraps it as
one module, the pipeline host divides the list. A layer that is in the list twice may be on two pipeline stages.

Shapes: B samples, T frames, H x W pixels, L text positions, P projection size, S visual positions, D hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from moe.working import WorkingCopies, made_ready, working_copies
from omnivl.chain.backward import Backward
from omnivl.chain.modules import HasUndecayed, Resizable
from omnivl.chain.momentum import LocalStorage, ema_update_, whole_parameter
from omnivl.chain.objective import Objective
from omnivl.chain.pictures import Pictures
from omnivl.chain.state import State, StepLayout

EMBEDDING_STACK = "contrast"
"""Stack of the layer that makes contrastive embeddings."""


class ChainLayer(nn.Module, ABC):
    """One layer of the chain: the unit that a pipeline assigns to stages and that ZeRO-3 gathers (a "leaf module").

    A layer whose stream is absent from the layout returns the state unchanged. ``forward`` changes no attribute or
    buffer (activation recomputation would do it twice); ``after_step`` makes the changes that are due after a step.

    Attributes:
        stack: The stack that it belongs to, by which figures are summed up; its own name if it belongs to none.
        level: Index of the block in its stack, from 0 at the bottom; -1 below the blocks of all stacks; None for a
            layer that is no block.
        recomputes: Whether the backward pass computes the layer anew; its copies are then not kept until then.
        branch: The branch that it is a layer of; None where branches come together. A branch is a part of the chain
            that reads its own stream alone, such as an encoder: no gradient enters what is trained on another one.
        local_storage: Returns this process' part of a parameter. A host that shards parameters replaces it.
        copies: Of parameters in the dtype of the activations.
        drops_padding: Whether ``kept_positions`` are computed, whose number changes from batch to batch.
        backward: What of the backward pass ``flops`` counts; the whole until something is frozen.
    """

    stack: str
    level: int | None = None
    recomputes: bool = False
    branch: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.local_storage: LocalStorage = whole_parameter
        self.copies = WorkingCopies()
        self.drops_padding = True
        self.backward = Backward()

    def kept_positions(self, state: State) -> dict[str, Tensor]:
        """The positions of texts that later layers compute, where that is known before the step, by ``kept_name``.

        Args:
            state: At the head of the chain, on the host.
        """
        return {}

    def __call__(self, state: State) -> State:
        """Runs ``forward`` with copies of the parameters in the dtype of the activations."""
        with working_copies(self.copies):
            made: State = super().__call__(state)
        return made

    @abstractmethod
    def forward(self, state: State) -> State:
        """Returns a new state with this layer's stream advanced."""

    def acts(self, layout: StepLayout) -> bool:
        """Whether the layer acts under ``layout``. Inference skips layers that do not."""
        return True

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Floating-point operations of the matrix products of one pass in a step, forward and backward.

        By default 0; see ``omnivl.chain.flops``. Momentum twins count forward only.

        Args:
            layout: The step.
            tokens: Mean number of tokens of its texts, with start and end tokens but without padding; None: the text
                length.
            number: How often the layer was passed before in the step.
        """
        return 0.0

    def branch_of(self, name: str) -> str | None:
        """The branch that reads one of the layer's parameters, by its name within the layer: the layer's own.

        A layer that starts several branches overrides it. Those of ``VISUAL`` in it are multiplied with pixels.
        """
        return self.branch

    def acts_on_pass(self, layout: StepLayout, number: int) -> bool:
        """Whether one of the layer's passes acts under ``layout``; if not, it returns the state unchanged.

        Args:
            layout: Of the step.
            number: How often the layer was passed before in it.
        """
        return self.acts(layout)

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """The parameters that get a gradient under none of ``layouts``."""
        if not any(self.acts(layout) for layout in layouts):
            yield from self.parameters()

    def unread_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """The parameters, a twin's among them, that no pass reads under any of ``layouts``."""
        if not any(self.acts(layout) for layout in layouts):
            yield from self.parameters()

    def resize(self, name: str, before: Tensor, own: Tensor) -> Tensor | None:
        """Resizes a parameter of this layer: position tables, 3D kernels and the like.

        Args:
            name: Within the layer.
            before: Its value at another size.
            own: Its value here; kept for entries that ``before`` does not have, e.g. positions of a longer text.

        Returns:
            fp32, of the shape of ``own``; None if the layer cannot convert the one shape into the other.
        """
        module, _, inner = name.rpartition(".")
        owner = self.get_submodule(module)
        if owner is self or not isinstance(owner, Resizable) or before.shape[1:] != own.shape[1:]:
            return None
        return owner.resize(inner, before.float(), own)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The parameters of two or more dimensions that weight decay leaves out, as it does all of fewer."""
        for module in self.modules():
            if module is not self and isinstance(module, HasUndecayed):
                yield from module.undecayed()

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that belong to heads of objectives; by default none."""
        yield from ()

    def twins(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Every momentum twin, and the module that it follows."""
        for name, twin in self.named_children():
            if name.startswith("momentum_"):
                yield twin, self.get_submodule(name.removeprefix("momentum_"))

    def followed_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that momentum twins follow."""
        for _, online in self.twins():
            yield from online.parameters()

    def after_step(self) -> None:
        """Called once per optimizer step, after the weights were updated: updates momentum twins and the queue."""

    def discard_step(self) -> None:
        """Called instead of ``after_step`` when a step was skipped: drops values that ``forward`` kept for it."""

    def step_sums(self) -> tuple[Tensor, ...]:
        """Sums over the passes of a step that ``forward`` has kept for ``after_step``, fp32.

        A host that runs the passes of a layer in several processes writes the sums over all of them into these tensors
        before it calls ``after_step`` in each. Number and shapes of the tensors are the same in every step.
        """
        return ()


class Chain(nn.Module):
    """The layers in their order, and runs of parts of them for inference.

    Under ZeRO-3 a layer gathers its parameters when it is called, so that methods of the chain call whole layers only.
    """

    def __init__(
        self,
        layers: Mapping[str, ChainLayer],
        order: Sequence[str] | None = None,
        objectives: Sequence[Objective] = (),
    ) -> None:
        """Makes a chain of layers.

        Args:
            layers: By name.
            order: Names in the order of the forward pass, in which a layer may occur twice; None: each once, as given.
            objectives: Those whose heads the last layer has.
        """
        super().__init__()
        self.objectives = {objective.key: objective for objective in objectives}
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._order = tuple(layers if order is None else order)

    @property
    def layers(self) -> list[ChainLayer]:
        """All layers, each once."""
        return [cast(ChainLayer, layer) for layer in self.children()]

    @property
    def named_layers(self) -> dict[str, ChainLayer]:
        """All layers, each once, by name."""
        return {name: cast(ChainLayer, layer) for name, layer in self.named_children()}

    @property
    def program(self) -> list[ChainLayer]:
        """The layers of a forward pass, first to last."""
        return [cast(ChainLayer, self.get_submodule(name)) for name in self._order]

    @property
    def passes(self) -> list[tuple[str, int]]:
        """The program by names: the layer, and how often it was passed before."""
        return [(name, self._order[:place].count(name)) for place, name in enumerate(self._order)]

    def forward(self, state: State, *, embeds: bool = False) -> State:
        """The forward pass. In training the result holds ``loss``.

        Args:
            state: At the head of the chain.
            embeds: Whether to end behind the layer that makes contrastive embeddings.
        """
        with made_ready([layer.copies for layer in self.layers if not layer.recomputes]):
            for layer in self.program:
                state = layer(state)
                if embeds and layer.stack == EMBEDDING_STACK:
                    break
        return state

    def fold(self, state: State) -> State:
        """The forward pass through those layers only that act under the state's layout."""
        for layer in self.program:
            if layer.acts(state.layout):
                state = layer(state)
        return state

    def after_step(self) -> None:
        """To be called once after every optimizer step."""
        for layer in self.layers:
            layer.after_step()

    def discard_step(self) -> None:
        """To be called instead of ``after_step`` where a loss or gradient was not finite and the step was skipped."""
        for layer in self.layers:
            layer.discard_step()

    def set_local_storage(self, storage: LocalStorage) -> None:
        """Sets ``local_storage`` of every layer (see ``ema_update_``)."""
        for layer in self.layers:
            layer.local_storage = storage

    def copy_to_twins(self) -> None:
        """Makes every momentum twin equal to the module that it follows, e.g. after weights were loaded."""
        for layer in self.layers:
            for twin, online in layer.twins():
                ema_update_(twin, online, 0.0, layer.local_storage)

    def followed_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that momentum twins follow: read after each step as they are, without a cast."""
        for layer in self.layers:
            yield from layer.followed_parameters()

    def encode_visual(self, frames: Tensor | Pictures) -> Tensor:
        """Contrastive embeddings of images or clips.

        Args:
            frames: uint8 ``[B, T, 3, H, W]``, T = 1 for images; or pictures of their own sizes.

        Returns:
            fp32 ``[B, P]``, L2-normalised; ``[B, M, P]`` where the architecture makes several of each.
        """
        pictures = Pictures.of(frames)
        layout = replace(visual_layout(pictures), class_only=True)
        return self.fold(State(pictures.fields, layout))["visual_embedding"]

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Contrastive embeddings of texts.

        Args:
            token_ids: int64 ``[B, L]``.

        Returns:
            fp32 ``[B, P]``, L2-normalised.
        """
        layout = replace(text_layout(len(token_ids)), class_only=True)
        return self.fold(State({"token_ids": token_ids}, layout))["text_embedding"]

    def features(self, frames: Tensor) -> Tensor:
        """Visual features that the decoders attend to, ``[B, S, D]`` in the compute dtype.

        Args:
            frames: uint8 ``[B, T, 3, H, W]``; T = 1 for images.
        """
        return self.fold(State({"frames": frames}, visual_layout(frames)))["visual"]


def pass_label(name: str, number: int) -> str:
    """Name of one of ``Chain.passes`` in files and tables: ``unified_00``, then ``unified_00 (pass 2)``."""
    return name if number == 0 else f"{name} (pass {number + 1})"


def visual_layout(frames: Tensor | Pictures) -> StepLayout:
    """The layout that encodes ``frames [B, T, 3, H, W]``, images or clips, or ``Pictures`` and nothing else."""
    pictures = Pictures.of(frames)
    batch_size, num_frames = pictures.frames.shape[:2]
    return StepLayout(pictures.kind, batch_size, num_frames, "encode", visual={"clean": slice(0, batch_size)})


def text_layout(batch_size: int) -> StepLayout:
    """The layout that encodes ``batch_size`` texts and nothing else."""
    return StepLayout("image_text", batch_size, 1, "encode", text={"clean": slice(0, batch_size)})
