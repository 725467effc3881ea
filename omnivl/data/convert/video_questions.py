"""MSRVTT-QA and MSVD-QA: a list of questions about clips."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.clips import clip_of, find_clips
from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import FormReader, MakeEntry, split_of
from omnivl.data.convert.lists import load_text
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record


@dataclass(frozen=True)
class VideoQuestionsReader(FormReader):
    """MSRVTT-QA and MSVD-QA: a sample for each question, with a copy of its clip.

    Attributes:
        questions: train_qa.json, val_qa.json, test_qa.json; one list, or an object on each line.
        clips: Folder of the clips.
        mapping: MSVD's youtube_mapping.txt, with the name of a clip and vidNUMBER on each line.

    Examples:
      omnivl data convert video-questions test_qa.json clips --out shards
      omnivl data convert video-questions val_qa.json clips --mapping youtube_mapping.txt --out shards
    """

    form = "video-questions"
    title = "MSRVTT-QA and MSVD-QA"
    known = "question answer answer_type video video_id question_id id category_id"

    questions: Path
    clips: Path
    mapping: Path | None = None

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The questions in their order.

        Raises:
            DataError: There are no clips, or a file cannot be read.
        """
        clips = find_clips(self.clips)
        lines = [] if self.mapping is None else load_text(self.mapping).split("\n")
        names = {words[1]: words[0] for line in lines if len(words := line.split()) == 2}
        rows = enumerate(read.objects(self.questions))
        return (partial(self._entry, number, record, clips, names) for number, record in rows)

    def _entry(self, number: int, record: Record, clips: Mapping[str, Path], names: Mapping[str, str]) -> Entry:
        question = record.text("question", "missing_caption")
        given = next((name for name in ("question_id", "id") if record.has(name)), None)
        identifier = number if given is None else record.identifier(given)
        video = record.identifier("video" if record.has("video") else "video_id")
        tried = [str(video)] if isinstance(video, str) else [f"video{video}", f"vid{video}", str(video)]
        path = clip_of(clips, record, *(names.get(name, name) for name in tried))
        first = question.split()[0].lower()
        return Entry(
            path=path,
            name=f"{self.questions.stem}-{identifier}",
            where=record.where,
            captions=(question,),
            identity=f"video {path.stem}",
            split=self.split or split_of(self.questions.stem),
            meta={
                "question": question,
                "question_id": identifier,
                "question_type": first if first in _TYPES else "other",
                "answers": [record.text("answer")],
            },
        )


_TYPES = ("what", "who", "how", "when", "where")
