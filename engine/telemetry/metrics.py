"""The log of a run's metrics: one JSON line per record, and the same figures for TensorBoard.

A line holds ``step`` (optimizer steps taken), ``event`` (``train`` or ``evaluation``) and figures in groups. Everything
that may differ between two equal runs (time, memory) lies in the group ``speed``, so that a resumed run can be compared
with an uninterrupted one line by line.

TensorBoard counts the steps of the whole run, so that the curves of its stages follow each other. It gets the leading
figures under the names that the report uses, each as a card of one of a few groups (``engine.telemetry.panels``), and
pictures of samples as the model sees them; the file has everything.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from engine.errors import RunFileError, unwritable
from engine.processes.files import read_whole
from engine.telemetry.panels import NOT_DRAWN, figure_name, is_leading_score, panel_of
from omnivl.data.plain_files import not_through_links
from omnivl.shown import markdown_text

if TYPE_CHECKING:  # torch takes a second to import, and commands that only read metrics do without
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

    from omnivl.data.batch import Batch


_SCORED = {"evaluation": "Scores", "curve": "Curve"}
"""Events with scores, and the group of TensorBoard's cards that shows them."""

_SAMPLES, _FRAMES = 8, 4
"""Samples of a batch, and frames of each, that TensorBoard shows."""


class MetricsLog:
    """Appends records to ``metrics.jsonl`` and to TensorBoard. Owned by one process of the run."""

    def __init__(
        self, file: Path, tensorboard: Path | None, *, keep_bytes: int = 0, step: int = 0, steps_before: int = 0
    ) -> None:
        """Opens the log and removes what was written after the checkpoint that is resumed.

        Args:
            file: ``metrics.jsonl``.
            tensorboard: Folder of event files; None writes none.
            keep_bytes: Length of the file when the checkpoint was taken; 0 starts over.
            step: Step of that checkpoint: TensorBoard hides what older event files hold beyond it.
            steps_before: Steps of the earlier stages, from which TensorBoard counts on.

        Raises:
            RunFileError: The file cannot be written.
        """
        self._path = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(file, "a+b", opener=not_through_links)  # noqa: SIM115 - close closes it
            self._file.truncate(_end_of_lines(self._file, keep_bytes))
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise unwritable(file, error) from error
        self._writer = None if tensorboard is None else _open_tensorboard(tensorboard, steps_before + step)
        self._steps_before = steps_before

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def write(self, step: int, event: str, **groups: Mapping[str, float] | float | bool | str) -> None:
        """Appends one record.

        Args:
            step: Optimizer steps taken.
            event: ``train``, ``evaluation`` ...
            groups: Figures, alone or in named groups.

        Raises:
            RunFileError: The disk is full or gone.
        """
        record: dict[str, Any] = {"step": step, "event": event, **groups}
        try:
            self._file.write(json.dumps(_finite(record), sort_keys=True, allow_nan=False).encode() + b"\n")
            self._file.flush()
            if self._writer is not None:
                for tag, value in _cards(event, groups).items():
                    self._writer.add_scalar(tag, value, self._steps_before + step)
        except OSError as error:
            raise unwritable(self._path, error) from error

    def draw(self, step: int, event: str, **groups: Mapping[str, float]) -> None:
        """Shows the leading figures of a record that stands in another file in TensorBoard.

        Args:
            step: Optimizer steps taken.
            event: ``curve``.
            groups: As those of ``write``.

        Raises:
            RunFileError: The disk is full or gone.
        """
        if self._writer is None:
            return
        try:
            for tag, value in _cards(event, groups).items():
                self._writer.add_scalar(tag, value, self._steps_before + step)
            self._writer.flush()
        except OSError as error:
            raise unwritable(self._path, error) from error

    def show_samples(self, step: int, batch: "Batch") -> None:
        """Shows the first samples of a batch in TensorBoard: their pixels, a row for each, and their texts.

        Args:
            step: Optimizer steps taken.
            batch: As the loader gives it, before the chain masks and normalises.
        """
        if self._writer is None:
            return
        at = self._steps_before + step
        if batch.frames is not None:
            self._writer.add_image("Samples/pictures", _rows_of_frames(batch.frames[:_SAMPLES], batch.grids), at)
        if batch.captions:
            texts = [f"{number}. {markdown_text(text)}" for number, text in enumerate(batch.captions[:_SAMPLES], 1)]
            self._writer.add_text("Samples/texts", "\n".join(texts), at)

    def close(self) -> None:
        """Flushes and closes both logs.

        Raises:
            RunFileError: The disk is full or gone.
        """
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            raise unwritable(self._path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Returns all whole records; a last line that a crash left incomplete is left out.

    Args:
        file: ``metrics.jsonl``; may be missing.

    Raises:
        RunFileError: A whole line is no record.
    """
    if not file.is_file():
        return []
    try:
        lines = read_whole(file).split(b"\n")[:-1]
    except OSError as error:
        raise RunFileError(f"{file}: got a file that cannot be read ({error.strerror}); allow to read it") from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line else None
        except (ValueError, RecursionError) as error:
            raise RunFileError(f"{file}:{number}: got a line that is no record ({error}); remove the line") from error
        if line and not (isinstance(record, dict) and {"step", "event"} <= record.keys()):
            raise RunFileError(f"{file}:{number}: got a line without a step and an event; remove the line")
        if record is not None:
            records.append(record)
    return records


def record_behind(file: Path, offset: int) -> tuple[dict[str, Any], int] | None:
    """The record that begins at a byte of the file, and where it ends; None where there is no whole one.

    Args:
        file: ``metrics.jsonl``; may be missing.
        offset: In bytes.
    """
    if not file.is_file():
        return None
    with file.open("rb") as log:
        log.seek(offset)
        line = log.readline()
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return (record, offset + len(line)) if isinstance(record, dict) else None


def bytes_up_to(file: Path, step: int) -> int:
    """Length of the records up to the last one that is of this step or an earlier one.

    Args:
        file: Records in the order of their steps; may be missing.
        step: Optimizer steps taken.

    Raises:
        RunFileError: A whole line is no record.
    """
    kept = sum(record["step"] <= step for record in read_metrics(file))
    lines = read_whole(file).splitlines(keepends=True)[:kept] if kept else []
    return sum(map(len, lines))


def _end_of_lines(file: BinaryIO, most: int) -> int:
    """The end of the last whole line within so many bytes: a file that was cut ends in the middle of one."""
    file.seek(0)
    kept = file.read(most)
    return kept.rfind(b"\n") + 1


def _open_tensorboard(folder: Path, step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter  # takes 1-2 s, and not every run needs it

    return SummaryWriter(str(folder), purge_step=step + 1)


def _finite(value: Any) -> Any:
    """Puts null where a figure is not finite: JSON knows neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows_of_frames(shown: "Tensor", grids: "Tensor | None") -> "Tensor":
    """One picture of some samples, a row for each, its frames evenly chosen: uint8 ``[3, rows, columns]``.

    Pictures of their own sizes stand in the upper left corner of a black one.
    """
    if grids is not None:
        from omnivl.data.collate import from_strip  # see above

        whole = [from_strip(one, (rows, columns)) for one, (rows, columns) in zip(shown, grids.tolist(), strict=False)]
        height, width = (max(one.shape[side] for one in whole) for side in (-2, -1))
        canvas = shown.new_zeros(*shown.shape[:3], height, width)
        for own, one in zip(canvas, whole, strict=True):
            own[..., : one.shape[-2], : one.shape[-1]] = one
        shown = canvas
    count = shown.shape[1]
    chosen = [index * count // min(count, _FRAMES) for index in range(min(count, _FRAMES))]
    return shown[:, chosen].permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2).cpu()


def _cards(event: str, groups: Mapping[str, Any]) -> dict[str, float]:
    """The figures that TensorBoard shows, by the name of their card."""
    flat: dict[str, float] = {}
    for group, value in groups.items():
        items = value.items() if isinstance(value, Mapping) else [("", value)]
        flat |= {
            (f"{group}/{name}" if name else group): float(number)
            for name, number in items
            if isinstance(number, (int, float))
        }
    if event in _SCORED:
        scores = {name.removeprefix("scores/"): value for name, value in flat.items()}
        return {f"{_SCORED[event]}/{name}": value for name, value in scores.items() if is_leading_score(name)}
    if event != "train":
        return {}
    cards: dict[str, float] = {}
    for key, value in flat.items():
        card = "" if key in NOT_DRAWN else panel_of(key).card
        if card and not key.startswith("lr/"):
            cards[f"{card}/{figure_name(key)}"] = value
    rates = {key: value for key, value in flat.items() if key.startswith("lr/")}
    if rates:
        cards["Optimizer/learning rate"] = max(rates.values())
    return cards
