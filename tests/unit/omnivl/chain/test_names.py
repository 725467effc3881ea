"""Earlier names are translated to today's."""

import pytest

from omnivl.chain.names import current_name


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("contrast.queue.visual", "losses.heads.univlc.queue.visual"),
        ("contrast.queue", "contrast.queue"),
        ("contrast.logit_scale", "contrast.logit_scale"),
        ("losses.heads.univlc.queue.visual", "losses.heads.univlc.queue.visual"),
    ],
)
def test_only_what_has_moved_is_renamed(before: str, now: str) -> None:
    assert current_name(before) == now
