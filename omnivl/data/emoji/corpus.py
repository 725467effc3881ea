"""The texts that the embedded vocabulary is trained on."""

from collections.abc import Iterator, Sequence

from omnivl.data.emoji.captions import captions_of
from omnivl.data.emoji.join import Concept
from omnivl.data.sources.motion_poses import MOTION_CLASSES

PROMPTS = (
    "a picture of {}",
    "a drawing of {}",
    "a photo of {}",
    "an image of {}",
    "an emoji of {}",
    "an icon of {}",
    "an animation of {}",
    "a video of {}",
    "a clip of {}",
    "something from the category {}",
)


def vocabulary_texts(concepts: Sequence[Concept]) -> Iterator[str]:
    """Captions, groups, subgroups in prompts, and motion captions of all concepts."""
    for concept in concepts:
        yield from captions_of(concept.identity, concept.name, concept.tags)
        yield concept.group
        for template in PROMPTS:
            yield template.format(concept.subgroup)
        for motion in MOTION_CLASSES:
            yield f"the {concept.name} {motion}"
        yield f"the {concept.name} appears before the {concept.name}"
