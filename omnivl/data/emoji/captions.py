"""The texts of a concept: its name, and its name among its tags."""

from collections.abc import Sequence

from omnivl.randomness import stable_hash

NUM_VARIANTS = 2


def captions_of(hexcode: str, name: str, tags: Sequence[str]) -> list[str]:
    """Captions of one concept, the plain name first.

    Then the name with all tags, and ``NUM_VARIANTS`` texts with the name at a random position among half of the tags,
    so that a model need not learn the position or the whole list. Tags that only repeat the name are left out.

    Args:
        hexcode: Keys the choice of tags and their order.
        name: Name.
        tags: Keywords.
    """
    keywords = [tag for tag in tags if tag.casefold() != name.casefold()]
    captions = [name]
    if not keywords:
        return captions
    captions.append(", ".join([name, *keywords]))
    for variant in range(NUM_VARIANTS):
        order = sorted(keywords, key=lambda tag: stable_hash("emoji", "caption", hexcode, variant, tag))
        half = order[: (len(order) + 1) // 2]
        place = stable_hash("emoji", "caption", hexcode, variant) % (len(half) + 1)
        captions.append(", ".join([*half[:place], name, *half[place:]]))
    return list(dict.fromkeys(captions))
