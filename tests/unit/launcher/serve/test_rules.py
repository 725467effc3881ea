"""Which requests are answered: by address, by origin, by length and type."""

from http import HTTPStatus

import pytest

from launcher.serve.rules import RefusedError, body_length, check_host, check_origin, is_loopback


@pytest.mark.parametrize(
    "header", ["127.0.0.1:8765", "127.0.0.1", "localhost:8765", "LOCALHOST", "[::1]:8765", "[::1]"]
)
@pytest.mark.parametrize("bound", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_is_itself_by_any_of_its_names(header: str, bound: str) -> None:
    check_host(header, bound)


@pytest.mark.parametrize(
    "header",
    [
        *[None, "", "evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil.example:8765"],
        *["10.0.0.7:8765", "[2001:db8::1]:8765", "[::1]evil", "[::1", "127.0.0.1:80:90", "127.0.0.1:x", "2130706433"],
        *["127.0.0.1@evil.example", "evil.example#localhost"],
    ],
)
def test_a_name_that_points_here_is_refused(header: str | None) -> None:
    with pytest.raises(RefusedError) as caught:
        check_host(header, "127.0.0.1")
    assert caught.value.status == HTTPStatus.MISDIRECTED_REQUEST


def test_on_the_network_addresses_and_the_given_name_are_taken() -> None:
    for header in ("10.0.0.7:8765", "[2001:db8::1]:8765", "localhost:8765", "127.0.0.1"):
        check_host(header, "0.0.0.0")
    check_host("Lab-PC:8765", "lab-pc")
    for header, bound in (
        ("evil.example", "0.0.0.0"),
        ("lab-pc.evil.example", "lab-pc"),
        ("0.0.0.0.evil.example", "::"),
    ):
        with pytest.raises(RefusedError):
            check_host(header, bound)


def test_loopback() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.7", "lab-pc", ""]))


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "127.0.0.1:1", "Origin": "http://evil.example"},
        {"Host": "127.0.0.1:1", "Origin": "null"},
        {"Host": "127.0.0.1:1", "Origin": "http://127.0.0.1:2"},
        {"Host": "127.0.0.1:1", "Sec-Fetch-Site": "cross-site"},
        {"Host": "127.0.0.1:1", "Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_sites_are_refused(headers: dict[str, str]) -> None:
    with pytest.raises(RefusedError, match="Origin: got another site"):
        check_origin(headers)


def test_the_page_itself_and_what_is_no_browser_are_not() -> None:
    check_origin({"Host": "127.0.0.1:1", "Origin": "http://127.0.0.1:1", "Sec-Fetch-Site": "same-origin"})
    check_origin({"Host": "127.0.0.1:1", "Sec-Fetch-Site": "none"})
    check_origin({"Host": "127.0.0.1:1"})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "image/png"}, HTTPStatus.LENGTH_REQUIRED),
        ({"Content-Type": "image/png", "Content-Length": "-1"}, HTTPStatus.LENGTH_REQUIRED),
        ({"Content-Type": "image/png", "Content-Length": "\u0661"}, HTTPStatus.LENGTH_REQUIRED),
        ({"Content-Type": "image/png", "Content-Length": "101"}, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
        ({"Content-Type": "image/png", "Content-Length": "9" * 5000}, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
        ({"Content-Length": "5"}, HTTPStatus.UNSUPPORTED_MEDIA_TYPE),
        ({"Content-Type": "text/plain", "Content-Length": "5"}, HTTPStatus.UNSUPPORTED_MEDIA_TYPE),
        ({"Content-Type": "image/png", "Transfer-Encoding": "chunked"}, HTTPStatus.NOT_IMPLEMENTED),
    ],
)
def test_bodies_need_a_type_and_a_length_within_bounds(headers: dict[str, str], status: HTTPStatus) -> None:
    with pytest.raises(RefusedError) as caught:
        body_length(headers, "image/|video/", 100)
    assert caught.value.status == status


def test_bodies_within_bounds() -> None:
    assert body_length({"Content-Type": "Video/MP4; x=y", "Content-Length": "100"}, "image/|video/", 100) == 100
