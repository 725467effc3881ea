"""VIOLIN: clips of films by number, each with subtitles and three statements in a true and a false wording."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.clips import clip_of, find_clips
from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import FormReader, MakeEntry
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record


@dataclass(frozen=True)
class ViolinReader(FormReader):
    """VIOLIN: a sample for each statement, with a copy of its clip.

    Attributes:
        statements: violin_annotation.json.
        clips: Folder of the clips.
        subtitles: Whether the text is the statement with the subtitles behind it, of which a model reads what fits.

    Examples:
      omnivl data convert violin violin_annotation.json clips --out shards
    """

    form = "violin"
    title = "VIOLIN"
    known = "file split sub statement span source"

    statements: Path
    clips: Path
    subtitles: bool = False

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The statements in the clips' order, each true one before its false one.

        Raises:
            DataError: There are no clips.
        """
        clips = find_clips(self.clips)
        for name, record in read.by_name(self.statements):
            for number, pair in enumerate(read.values(record, "statement")):
                for answer in ("true", "false"):
                    yield partial(self._entry, name, record, number, pair, answer, clips)

    def _entry(
        self, name: str, record: Record, number: int, pair: object, answer: str, clips: Mapping[str, Path]
    ) -> Entry:
        place = f"{record.place}.statement[{number}]"
        statement = Record(record.file, place, {"pair": pair}).texts("pair", 2, "missing_caption")[answer == "false"]
        said = record.each("sub", _spoken, "a list that begins with a text")
        return Entry(
            path=clip_of(clips, record, record.text("file"), name),
            name=f"{name}-{number}-{answer}",
            where=f"{record.file}{place}",
            captions=(" ".join([statement, *said]) if self.subtitles else statement,),
            identity=f"violin {name}",
            split=self.split or record.text("split"),
            meta={"subtitle": " ".join(said), "answer": answer, "pair_id": f"{name}-{number}"},
        )


def _spoken(line: object) -> str | None:
    """The text of a line of subtitles, which is followed by its times."""
    text = line[0] if isinstance(line, list) and line else line
    return " ".join(text.split()) if isinstance(text, str) else None
