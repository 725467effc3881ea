"""Lists of texts in a plan: given as such, or as the path of a text file."""

from pathlib import Path

from omnivl.data.plain_files import MAX_TEXT_FILE, read_small, text_lines
from omnivl.errors import UserError


def read_list(texts: str | tuple[str, ...], where: str, option: str) -> tuple[str, ...]:
    """The list.

    Args:
        texts: The list, or the path of a text file with a text on each line.
        where: Location of the option, for messages.
        option: Its name.

    Raises:
        UserError: There is no such file, or a text occurs twice or is empty.
    """
    if isinstance(texts, str):
        allowed = f"allowed is a text file with one of the {option} on each line, or the list itself; change it"
        try:
            text = read_small(Path(texts), MAX_TEXT_FILE).decode("utf-8-sig")
        except FileNotFoundError as error:
            what = f"there is no such file (working folder {Path.cwd()})"
            raise UserError(f"{where}: {option} is {texts!r}, and {what}; {allowed}") from error
        except (OSError, UnicodeDecodeError) as error:
            what = f"it cannot be read ({getattr(error, 'strerror', None) or 'no UTF-8 text'})"
            raise UserError(f"{where}: {option} is {texts!r}, and {what}; {allowed}") from error
        texts = tuple(text_lines(text))
    seen: set[str] = set()
    for place, one in enumerate(texts):
        if one in seen or not one.strip():
            what = f"{one!r} a second time" if one in seen else "an empty text"
            raise UserError(f"{where}: {option}.{place} is {what}; allowed is each once; remove it")
        seen.add(one)
    return tuple(texts)
