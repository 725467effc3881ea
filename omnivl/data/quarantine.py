"""Bad samples: counts by cause, a log with their names, and the limit at which the run stops."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from omnivl.data.plain_files import not_through_links
from omnivl.data.sources.base import CAUSES, SHARD_CAUSES, Rejection
from omnivl.errors import DataError


class Quarantine:
    """Counts and logs bad samples of one replica."""

    def __init__(self, *, max_bad_fraction: float, min_samples_to_judge: int, log: Path | None = None) -> None:
        """Starts with nothing seen.

        Args:
            max_bad_fraction: Share of bad samples that is tolerated.
            min_samples_to_judge: Samples to be seen before that share is judged.
            log: JSON-lines file that is appended to: ``cause``, ``where``, ``detail``, and the ``traceback`` of what
                nobody foresaw.
        """
        self._max_bad_fraction = max_bad_fraction
        self._min_samples = min_samples_to_judge
        self._log = log
        self._counts: Counter[str] = Counter()
        self._seen = 0
        self._bad = 0
        self._logged: set[tuple[str, str]] = set()

    @property
    def counts(self) -> Mapping[str, int]:
        """Bad samples by cause, in the order of ``CAUSES``."""
        return {cause: self._counts[cause] for cause in CAUSES if self._counts[cause]}

    @property
    def seen(self) -> int:
        """Good and bad samples that were looked at."""
        return self._seen

    def record_source(
        self, name: str, num_samples: int, num_shards: int, rejections: Iterable[Rejection], *, log: bool = True
    ) -> None:
        """Records the bad shards and samples that opening a source found, each with a limit of its own.

        Args:
            name: The source.
            num_samples: Its good samples.
            num_shards: Its shards.
            rejections: The bad shards and samples.
            log: Write to the log: every replica finds the same, and one line is enough.

        Raises:
            DataError: Too large a share of the source is bad.
        """
        found = list(rejections)
        self._note(found, log=log)
        bad_shards = [entry for entry in found if entry.cause in SHARD_CAUSES]
        bad_samples = len(found) - len(bad_shards)
        if len(bad_shards) > self._max_bad_fraction * num_shards:
            raise DataError(self._message(f"data source {name!r}", len(bad_shards), num_shards, "shards", found))
        total = num_samples + bad_samples
        if total >= self._min_samples and bad_samples > self._max_bad_fraction * total:
            raise DataError(self._message(f"data source {name!r}", bad_samples, total, "samples", found))

    def record(self, good: int, rejections: Iterable[Rejection]) -> None:
        """Records one micro-batch: ``good`` samples and the bad ones that were replaced.

        Raises:
            DataError: Too large a share of what was read so far is bad.
        """
        found = list(rejections)
        self._seen += good + len(found)
        self._note(found, log=True)
        self._bad += len(found)
        if found and self._seen >= self._min_samples and self._bad > self._max_bad_fraction * self._seen:
            raise DataError(self._message("data", self._bad, self._seen, "samples read", found))

    def _note(self, found: list[Rejection], *, log: bool) -> None:
        self._counts.update(entry.cause for entry in found)
        distinct = {(entry.cause, entry.where): entry for entry in found}
        fresh = [entry for name, entry in distinct.items() if name not in self._logged]
        self._logged.update((entry.cause, entry.where) for entry in fresh)
        if self._log is not None and log and fresh:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                json.dumps({name: value for name, value in vars(entry).items() if value}, ensure_ascii=False)
                for entry in fresh
            ]
            self._append("\n".join(lines) + "\n")

    def _append(self, text: str) -> None:
        assert self._log is not None
        try:
            with open(self._log, "a", encoding="utf-8", errors="backslashreplace", opener=not_through_links) as file:
                file.write(text)
        except OSError as error:
            raise DataError(
                f"{self._log}: the names of bad samples could not be written ({error.strerror or error}); make "
                "room, or remove what lies there"
            ) from error

    def _message(self, what: str, bad: int, total: int, unit: str, found: list[Rejection]) -> str:
        causes = ", ".join(f"{cause} {count}" for cause, count in self.counts.items())
        last = found[-1]
        log = "no log is kept" if self._log is None else f"all are named in {self._log}"
        return (
            f"{what}: {bad} of {total} {unit} are bad ({bad / total:.1%}); allowed: {self._max_bad_fraction:.1%} "
            f"(max_bad_fraction). Causes: {causes}; the last one: {last.where}: {last.detail}; {log}. Mend or remove "
            f"them, or raise max_bad_fraction"
        )
