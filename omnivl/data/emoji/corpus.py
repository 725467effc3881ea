"""The texts that the embedded vocabulary is trained on."""

from collections.abc import Iterator, Sequence

from omnivl.data.emoji.captions import captions_of
from omnivl.data.emoji.join import Concept

PROMPTS = (
    "a picture of {}",
    "a drawing of {}",
    "a photo of {}",
    "an emoji of {}",
    "an icon of {}",
    "an animation of {}",
    "a video of {}",
    "a clip of {}",
    "an image of the {}",
    "something from the category {}",
)
MOTION_TEXTS = (
    "the {} moves left",
    "the {} moves right",
    "the {} moves up",
    "the {} moves down",
    "the {} grows larger, zooms in",
    "the {} shrinks, zooms out",
    "the {} rotates clockwise",
    "the {} rotates counterclockwise",
    "the {} turns clockwise, then counter-clockwise",
    "the {} appears before the cat",
    "the {} appears after the dog",
    "the {} blinks once, twice, three times, four times",
    "the {} stays still",
)
_MOTION_WORD = "thing"


def vocabulary_texts(concepts: Sequence[Concept]) -> Iterator[str]:
    """Names, captions, groups, subgroups, prompts and motion captions of all concepts."""
    for concept in concepts:
        yield from captions_of(concept.identity, concept.name, concept.tags)
        for template in PROMPTS:
            yield template.format(concept.subgroup)
        yield concept.group
        for template in MOTION_TEXTS:
            yield template.format(_MOTION_WORD)
