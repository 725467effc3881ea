"""The layout of a step from the objectives' demands."""

from dataclasses import dataclass, field

import pytest

from omnivl.chain.demands import Demands, Join
from omnivl.chain.layout import lay_out, plan_layout
from omnivl.errors import ModelError

EMBEDDINGS = frozenset({"visual_embedding", "text_embedding"})
MOMENTUM = frozenset({"momentum_visual_embedding", "momentum_text_embedding"})


@dataclass(frozen=True)
class Asking:
    """Something with demands."""

    key: str
    wants: Demands | None
    on: tuple[str, ...] = field(default=())

    def acts_on(self, entry):
        return not self.on or entry in self.on

    def demands(self, kind, batch_size):
        return self.wants


def test_segments_are_stacked_in_order():
    layout = plan_layout(
        [
            Asking("mlm", Demands(rows={"text": {"mlm": 4}}, joins={"mlm": Join(text="mlm")})),
            Asking("mrm", Demands(rows={"visual": {"mrm": 2}})),
            Asking("lm", None),
            Asking("univlc", Demands(reads=EMBEDDINGS | MOMENTUM)),
            Asking("vlm", Demands(joins={"vlm/positive": Join(), "vlm/negative_text": Join(drawn="text")})),
        ],
        "image_text",
        4,
        1,
    )
    assert layout.visual == {"clean": slice(0, 4), "mrm": slice(4, 6)}
    assert layout.text == {"clean": slice(0, 4), "mlm": slice(4, 8)}
    assert layout.fused == {"mlm": slice(0, 4), "vlm/positive": slice(4, 8), "vlm/negative_text": slice(8, 12)}
    assert set(layout.twins) == {"visual", "text"}
    assert not layout.generation
    assert layout.objectives == ("mlm", "mrm", "univlc", "vlm")
    assert layout.joined == {"mlm", "clean"}
    assert not layout.class_only


def test_embeddings_alone_read_the_first_position_only():
    layout = plan_layout([Asking("univlc", Demands(reads=EMBEDDINGS | MOMENTUM))], "image_label", 4, 1)
    assert layout.class_only
    assert layout.visual == layout.text == {"clean": slice(0, 4)}
    assert not plan_layout([Asking("all", Demands(reads=frozenset({"visual"})))], "image_label", 4, 1).class_only
    named = Demands(rows={"text": {"names": 9}}, reads=frozenset({"visual_embedding", "names/embedding"}))
    assert plan_layout([Asking("names", named)], "image_label", 4, 1).class_only
    assert not plan_layout([Asking("mlm", Demands(rows={"text": {"mlm": 4}}))], "image_label", 4, 1).class_only


def test_a_masked_pass_alone_needs_no_clean_rows():
    layout = plan_layout([Asking("mfm", Demands(rows={"visual": {"mfm": 3}}))], "video_label", 3, 8)
    assert layout.visual == {"mfm": slice(0, 3)}
    assert not layout.text
    assert layout.is_video


def test_decoders_need_clean_visual_rows():
    layout = plan_layout([Asking("lm", Demands(joins={"lm": Join(text="lm", mask="causal")}))], "image_text", 2, 1)
    assert layout.visual == {"clean": slice(0, 2)}
    assert layout.generation == {"lm": slice(0, 2)}
    assert not layout.text
    assert not layout.fused


def test_a_twin_of_one_stream_leaves_the_other_out():
    demands = Demands(rows={"visual": {"mrm": 2}}, reads=frozenset({"momentum_visual"}))
    layout = plan_layout([Asking("mrm", demands)], "image_text", 2, 1)
    assert set(layout.twins) == {"visual"}
    assert not layout.text


def test_twins_of_fused_rows_compute_those_of_who_asks_and_what_they_are_made_of():
    masked = Demands(rows={"text": {"mlm": 4}}, joins={"mlm": Join(text="mlm")}, reads=frozenset({"momentum_fused"}))
    assert masked.twins == {"visual", "text", "fused"}
    assert masked.streams == {"fused", "momentum_fused"}
    matched = Demands(joins={"vlm/positive": Join(), "vlm/negative_text": Join(drawn="text")})
    layout = plan_layout([Asking("vlm", matched), Asking("mlm", masked)], "image_text", 4, 1)
    own = slice(0, 4)
    assert layout.twins == {"visual": {"clean": own}, "text": {"mlm": own}, "fused": {"mlm": own}}
    assert layout.segments("momentum_fused") == {"mlm": own}
    contrasted = Demands(reads=MOMENTUM)
    layout = plan_layout([Asking("mlm", masked), Asking("univlc", contrasted)], "image_text", 4, 1)
    assert layout.twins["text"] == {"clean": own, "mlm": slice(4, 8)}
    assert not plan_layout([Asking("vlm", matched)], "image_text", 4, 1).twins


def test_objectives_act_on_their_entries_only():
    wants = Demands(reads=EMBEDDINGS)
    asking = [Asking("everywhere", wants), Asking("questions", wants, on=("vqa",))]
    assert plan_layout(asking, "image_text", 2, 1, "captions").objectives == ("everywhere",)
    assert plan_layout(asking, "image_text", 2, 1, "vqa").objectives == ("everywhere", "questions")


def test_streams_follow_from_rows_joins_and_fields():
    demands = Demands(
        rows={"text": {"a": 1}},
        joins={"b": Join(), "c": Join(text="c", mask="causal")},
        reads=frozenset({"momentum_visual_embedding", "fused_visual"}),
    )
    assert demands.streams == {"text", "fused", "generation", "embedding", "fused_visual"}
    assert lay_out({"x": demands}, "image_text", 1, 1, "train").reads == demands.reads
    assert Demands(rows={"visual": {"a": 1}}).streams == {"visual", "masked_visual"}
    assert Demands(rows={"visual": {}}, reads=frozenset({"visual"})).streams == {"visual"}


def test_two_objectives_of_one_name_are_refused():
    twice = [Asking(key, Demands(rows={"visual": {"mrm": 2}})) for key in ("one", "two")]
    with pytest.raises(ModelError) as error:
        plan_layout(twice, "image_text", 2, 1)
    assert str(error.value) == (
        "objectives on image_text: two of them claim the stacked rows 'mrm'; give one of them another 'name', or "
        "remove it"
    )


def test_rows_that_are_only_joined_need_no_stream_of_their_own():
    joined = Demands(rows={"text": {"a": 1}}, joins={"a": Join(text="a")})
    assert joined.streams == {"fused"}
    alone = Demands(rows={"text": {"a": 1, "b": 1}}, joins={"a": Join(text="a")})
    assert alone.streams == {"text", "fused"}
    written = Demands(rows={"text": {"a": 1}}, joins={"a": Join(text="a", mask="causal")})
    assert written.streams == {"text", "generation"}


def test_queries_need_clean_visual_rows_and_a_stream():
    demands = Demands(reads=frozenset({"queries"}))
    layout = plan_layout((Asking("a", demands),), "image_text", 4, 1)
    assert (layout.visual, layout.text, layout.class_only) == ({"clean": slice(0, 4)}, {}, False)
    assert demands.streams == {"queries"}


def test_words_of_fused_rows_are_read_but_by_those_who_read_rows_as_a_whole():
    joins = {"words": frozenset(), "whole": frozenset({"pooled"}), "both": frozenset({"pooled", "fused_visual"})}
    asking = tuple(Asking(key, Demands(joins={key: Join()}, reads=reads)) for key, reads in joins.items())
    written = Asking("written", Demands(joins={"written": Join(mask="causal")}))
    assert plan_layout((*asking, written), "image_text", 4, 1).fused_text == ("words", "both")


def test_visual_positions_are_read_of_the_rows_of_those_who_ask():
    asking = Demands(joins={"a": Join(), "c": Join(text="c", mask="causal")}, reads=frozenset({"fused_visual"}))
    layout = lay_out({"a": asking, "b": Demands(joins={"b": Join()})}, "image_text", 2, 1, "train")
    assert layout.fused.keys() == {"a", "b"}
    assert layout.fused_visual == ("a",)


def test_generated_rows_may_look_at_fused_ones():
    asking = Demands(joins={"a/text": Join(), "a": Join("a", "a/text", "causal", times=3, length=5)})
    assert asking.streams == {"fused", "generation", "fused_generation"}
    other = Demands(joins={"b": Join()})
    layout = lay_out({"b": other, "a": asking}, "image_text", 2, 1, "train")
    assert layout.fused == {"b": slice(0, 2), "a/text": slice(2, 4)}
    assert layout.generation == {"a": slice(0, 6)}
    assert layout.written_from == ("a/text",)
    assert layout.visual == layout.text == {"clean": slice(0, 2)}
    looking = Demands(joins={"c": Join("c", mask="causal")})
    assert lay_out({"c": looking}, "image_text", 2, 1, "train").written_from == ()


@pytest.mark.parametrize(
    ("length", "what"),
    [(5, "lengths"), (None, "things to look at: a picture, and a text beside one")],
)
def test_generated_rows_that_cannot_be_stacked_are_refused(length, what):
    asking = Demands(joins={"a/text": Join(), "a": Join("a", "a/text", "causal", length=length)})
    looking = Demands(joins={"c": Join("c", mask="causal")})
    with pytest.raises(ModelError) as error:
        lay_out({"c": looking, "a": asking}, "image_text", 2, 1, "train")
    assert str(error.value) == (
        f"texts that 'c' and 'a' write in one step have different {what}; put the objectives into stages or data "
        "entries of their own"
    )
