from omnivl.parts.attributes import NAMES, attributes_of


def test_bits_are_those_of_the_papers_table() -> None:
    assert attributes_of("image") == attributes_of("video") == (1, 0, 0, 1, 1, 0, 0, 0)
    assert attributes_of("text") == (0, 1, 0, 1, 0, 1, 0, 0)
    assert attributes_of("text", fused=True, causal=True) == (1, 1, 0, 1, 0, 1, 1, 0)
    assert attributes_of("image", fused=True) == (1, 1, 0, 1, 1, 0, 0, 0)
    assert len(NAMES) == 8
