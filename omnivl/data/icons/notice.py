"""The notice that goes with the shards: who drew what, under which licence, and what was changed."""

from collections.abc import Mapping

from omnivl.data.icons.sets import SetInfo

_HEAD = """\
The pictures in this folder come from the icon sets below, as the npm package @iconify/json collects them. Each was
rasterised, put on a plain ground and re-encoded; icons without colours of their own were coloured. The JSON of each
sample names its set, author and licence. Keep this file with the shards: licences such as CC-BY ask for it. Names and
logos of companies and products among the icons are trademarks of their owners, which no licence of a drawing gives.
"""


def notice_of(infos: Mapping[str, SetInfo], counts: Mapping[str, int]) -> str:
    """The text of ``NOTICE``.

    Args:
        infos: The sets by prefix.
        counts: Number of samples by prefix; a set without any is not named.
    """
    entries = []
    for prefix, info in sorted(infos.items()):
        if counts.get(prefix):
            author = f"{info.author or 'author not stated'}{_in_brackets(info.author_address)}"
            licence = f"{info.licence}{_in_brackets(info.licence_address)}"
            entries.append(f"{prefix}: {info.title}, {counts[prefix]} icons. By {author}. Licence: {licence}\n")
    return "\n".join([_HEAD, *entries])


def _in_brackets(address: str) -> str:
    return f" ({address})" if address else ""
