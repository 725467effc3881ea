"""Captions of clips: MSR-VTT, MSVD, DiDeMo, ActivityNet Captions."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.clips import clip_of, find_clips
from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import ListedReader, MakeEntry, SplitLists, split_of
from omnivl.data.convert.lists import load_text
from omnivl.data.convert.pickles import load_pickle
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record, shown
from omnivl.data.sources.base import BadSampleError
from omnivl.errors import DataError

_Captions = tuple[str, Record, list[str]]
"""Name of a video, where it stands, its captions."""


@dataclass(frozen=True)
class VideoCaptionsReader(ListedReader):
    """Reads captions of clips, one sample for each clip.

    Attributes:
        captions: The file of captions.
        clips: Folder of the clips, which have the names of the videos.
    """

    captions: Path
    clips: Path

    @abstractmethod
    def videos(self, read: Reading) -> Iterator[_Captions]:
        """Each video once, with all its captions."""

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The videos in the file's order.

        Raises:
            DataError: The file is of another form, a list cannot be read, or there are no clips.
        """
        clips, splits = find_clips(self.clips), self.splits(read)
        return (partial(self._entry, *found, clips, splits) for found in self.videos(read))

    def _entry(
        self, video: str, record: Record, captions: list[str], clips: Mapping[str, Path], splits: SplitLists
    ) -> Entry:
        split = splits.of(video, record)
        if not captions:
            record.refuse("missing_caption", f"no caption of {video}")
        path = clip_of(clips, record, video)
        return Entry(
            path=path,
            name=path.name,
            where=record.where,
            captions=tuple(dict.fromkeys(captions)),
            identity=f"video {path.stem}",
            split=split or split_of(self.captions.stem),
            meta={"video_id": video},
        )


@dataclass(frozen=True)
class MsrVttReader(VideoCaptionsReader):
    """MSR-VTT: a clip with its twenty captions; or with the one that the test of 1,000 clips has.

    Attributes:
        captions: MSRVTT_data.json with --lists MSRVTT_train.9k.csv; or MSRVTT_JSFUSION_test.csv.

    Examples:
      omnivl data convert msrvtt MSRVTT_data.json clips --lists MSRVTT_train.9k.csv --out shards
      omnivl data convert msrvtt MSRVTT_JSFUSION_test.csv clips --out shards
    """

    form = "msrvtt"
    title = "MSR-VTT"
    known = "info videos sentences video_id caption sen_id sentence key vid_key category url split id"

    def videos(self, read: Reading) -> Iterator[_Captions]:
        """Each video once."""
        if self.captions.suffix == ".json":
            rows = read.listed(read.top(self.captions), "sentences")
            return _joined(read, rows, "video_id", "caption")
        return _joined(read, read.table(self.captions, ("video_id", "sentence")), "video_id", "sentence")


@dataclass(frozen=True)
class MsvdReader(VideoCaptionsReader):
    """MSVD: a clip with its captions, about forty.

    Attributes:
        captions: AllVideoDescriptions.txt, or raw-captions.pkl, of which only plain values are read and nothing is run.

    Examples:
      omnivl data convert msvd AllVideoDescriptions.txt clips --lists val_list.txt --out shards
    """

    form = "msvd"
    title = "MSVD"
    known = "video caption"

    def videos(self, read: Reading) -> Iterator[_Captions]:
        """Each video once."""
        if self.captions.suffix == ".txt":
            return _joined(read, self._lines(read), "video", "caption")
        return self._pickled()

    def _lines(self, read: Reading) -> Iterator[Record]:
        for number, line in enumerate(load_text(self.captions).split("\n"), start=1):
            video, _, caption = line.strip().partition(" ")
            if video and not video.startswith("#"):
                yield read.record(self.captions, f":{number}", {"video": video, "caption": caption})

    def _pickled(self) -> Iterator[_Captions]:
        found = load_pickle(self.captions)
        if not isinstance(found, dict):
            kind = type(found).__name__
            raise DataError(f"{self.captions}: holds a {kind}; allowed: captions by video; give another file")
        for video, captions in found.items():
            record = Record(self.captions, f":{shown(video)}", {})
            texts = [_sentence(one) for one in captions] if isinstance(captions, list) else []
            yield str(video), record, [text for text in texts if text]


@dataclass(frozen=True)
class DidemoReader(VideoCaptionsReader):
    """DiDeMo: a clip with its descriptions, in the file's order joined to a paragraph.

    Attributes:
        captions: train_data.json, val_data.json, test_data.json.

    Examples:
      omnivl data convert didemo test_data.json clips --out shards
    """

    form = "didemo"
    title = "DiDeMo"
    known = """video description times annotation_id num_segments dl_link reference_description context
        train_times reference"""

    def videos(self, read: Reading) -> Iterator[_Captions]:
        """Each video once, with one paragraph."""
        rows = read.objects(self.captions)
        for video, record, captions in _joined(read, rows, "video", "description"):
            yield video, record, [" ".join(captions)]


@dataclass(frozen=True)
class ActivityNetReader(VideoCaptionsReader):
    """ActivityNet Captions: a clip with its sentences joined to a paragraph.

    Attributes:
        captions: train.json, val_1.json, val_2.json.

    Examples:
      omnivl data convert activitynet val_1.json clips --out shards
    """

    form = "activitynet"
    title = "ActivityNet Captions"
    known = "duration timestamps sentences"

    def videos(self, read: Reading) -> Iterator[_Captions]:
        """Each video once, with one paragraph."""
        for video, record in read.by_name(self.captions):
            try:
                yield video, record, [" ".join(record.texts("sentences", cause="missing_caption"))]
            except BadSampleError as error:
                read.leave_out(error.rejection)


def _joined(read: Reading, rows: Iterator[Record], video: str, caption: str) -> Iterator[_Captions]:
    """Rows with a caption each, joined by their video, in the order in which videos first occur."""
    found: dict[str, tuple[Record, list[str]]] = {}
    for row in rows:
        try:
            name, text = row.text(video), row.text(caption, "missing_caption")
        except BadSampleError as error:
            read.leave_out(error.rejection)
            continue
        found.setdefault(name, (row, []))[1].append(text)
    return ((name, row, captions) for name, (row, captions) in found.items())


def _sentence(words: object) -> str | None:
    """A text, or one that was cut into words."""
    if isinstance(words, list) and all(isinstance(word, str) for word in words):
        return " ".join(words).strip()
    return words.strip() if isinstance(words, str) else None
