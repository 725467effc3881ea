"""Which requests are answered: those of the page itself, from this machine unless told otherwise, of bounded size.

A page of another site can make a browser send requests to this machine. Names that it points here (DNS rebinding) are
known by the ``Host`` header, its own requests by ``Origin`` and ``Sec-Fetch-Site``.
"""

import ipaddress
from collections.abc import Mapping
from http import HTTPStatus

LARGEST_UPLOAD = 32 << 20
LARGEST_JSON = 256 << 10

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer: nothing is loaded from elsewhere, run from within the page, framed, guessed or kept."""


class RefusedError(Exception):
    """A request that is not answered; its text is a sentence for whoever sent it."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        """Takes the status and the sentence."""
        super().__init__(message)
        self.status = status


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(header: str | None, bound: str) -> None:
    """Refuses a ``Host`` that is neither an address nor a name that the server was given.

    Args:
        header: The request's.
        bound: What ``--host`` says. Where that is this machine alone, only its own addresses are taken.

    Raises:
        RefusedError: It is another one.
    """
    name = _name(header or "")
    others = name in ("localhost", bound.lower()) or _is_address(name)
    if not (is_loopback(name) if is_loopback(bound) else others):
        raise RefusedError(
            HTTPStatus.MISDIRECTED_REQUEST,
            f"Host: got {header!r:.80}; allowed is the address of this server, as the command printed it",
        )


def check_origin(headers: Mapping[str, str]) -> None:
    """Refuses a request that the page of another site makes.

    Raises:
        RefusedError: It is one.
    """
    origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
    same = origin is None or origin == f"http://{headers.get('Host')}"
    if not same or site not in (None, "same-origin", "none"):
        raise RefusedError(HTTPStatus.FORBIDDEN, "Origin: got another site; allowed is the page of this server itself")


def body_length(headers: Mapping[str, str], kind: str, largest: int) -> int:
    """Bytes of a request's body.

    Args:
        headers: The request's.
        kind: Types that are taken: the beginning of one, or several of them separated by ``|``.
        largest: Most bytes.

    Raises:
        RefusedError: Length or type are missing or not allowed.
    """
    if headers.get("Transfer-Encoding") is not None:
        raise RefusedError(HTTPStatus.NOT_IMPLEMENTED, "Transfer-Encoding: got one; allowed is a Content-Length")
    given = (headers.get("Content-Type") or "").partition(";")[0].strip().lower()
    if not given.startswith(tuple(kind.split("|"))):
        raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"Content-Type: got {given!r:.60}; allowed is {kind}")
    length = headers.get("Content-Length") or ""
    if not (length.isascii() and length.isdigit()):
        raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "Content-Length: got none; allowed is the number of bytes")
    if len(length) > 15 or int(length) > largest:
        raise RefusedError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"file: got more than {largest / (1 << 20):g} MiB; allowed is less; cut the clip shorter, or scale it down",
        )
    return int(length)


def _name(header: str) -> str:
    """A ``Host`` header without its port, lower-case; "" where it is none."""
    if header.startswith("["):
        inside, closed, port = header[1:].partition("]")
        return inside.lower() if closed and (not port or _is_port(port[1:])) and port[:1] in ("", ":") else ""
    name, colon, port = header.partition(":")
    return name.lower() if not colon or _is_port(port) else ""


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
