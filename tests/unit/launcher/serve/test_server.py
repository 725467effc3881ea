"""The server over HTTP: what it answers, what it refuses, and that it lives on."""

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import patience
import pytest
from colour_gallery import gif, picture, png, served
from colour_model import ColourModel

from launcher.serve import server as server_module
from launcher.serve.answers import LONGEST_TEXT, MOST_LABELS, Answers
from launcher.serve.rules import LARGEST_JSON, LARGEST_UPLOAD
from launcher.serve.server import PAGE, PageServer
from omnivl.errors import UserError

JSON = {"Content-Type": "application/json"}
PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    with served(tmp_path_factory.mktemp("data"), ColourModel()) as running:
        yield running


def ask(
    server: PageServer, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=patience.seconds(30))
    try:
        connection.request(method, path, body, dict(headers or {}))
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


def post(server: PageServer, path: str, asked: object) -> tuple[int, Any]:
    status, _, body = ask(server, "POST", path, json.dumps(asked).encode(), JSON)
    return status, json.loads(body)


def upload(server: PageServer, data: bytes, query: str = "") -> tuple[int, Any]:
    status, _, body = ask(server, "POST", f"/api/picture{query}", data, PNG)
    return status, json.loads(body)


def test_the_page_and_its_files_are_our_own(server: PageServer) -> None:
    for path, (_, kind) in PAGE.items():
        status, headers, body = ask(server, "GET", path)
        assert (status, headers["Content-Type"]) == (200, kind)
        assert headers["X-Content-Type-Options"] == "nosniff"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert re.findall(rb"(?:https?:)?//[a-z0-9-]+\.[a-z]", body) == [], "nothing comes from elsewhere"
        assert ask(server, "HEAD", path)[2] == b""
    html = ask(server, "GET", "/")[2]
    assert re.findall(rb"<script(?![^>]*\bsrc=)|\bon\w+=|style=", html) == [], "which the policy would refuse"


def test_it_tells_about_the_run(server: PageServer) -> None:
    told = json.loads(ask(server, "GET", "/api/about")[2])
    assert (told["run"], told["stage"], told["step"]) == ("colours", "joint", 7)
    assert told["counts"] == {"image": 12, "video": 2}
    assert told["labels"] == ["blue", "green", "red"]
    assert set(told["examples"]) <= {f"{name} picture {n}" for name in told["labels"] for n in range(4)} | {"blue clip"}


def test_a_sentence_finds_pictures_and_clips_and_shows_its_words(server: PageServer) -> None:
    status, answer = post(server, "/api/text", {"text": "  a  green\nthing "})
    assert status == 200
    assert answer["text"] == "a green thing"
    assert [one["label"] for one in answer["results"][:4]] == ["green"] * 4
    scores = [one["score"] for one in answer["results"]]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0.99
    assert {one["media"] for one in answer["results"]} == {"image", "video"}
    (layer,) = answer["routing"]
    assert [(one["word"], one["expert"]) for one in layer["words"]] == [("a", -1), ("green", 1), ("thing", -1)]
    assert layer["shares"] == pytest.approx([0, 1 / 3, 0, 0]) and layer["nobody"] == pytest.approx(2 / 3)


def test_an_uploaded_picture_gets_all_answers(server: PageServer) -> None:
    status, answer = upload(server, png(picture("blue", share=0.5)))
    assert status == 200
    assert answer["caption"] == "a blue picture"
    assert answer["labels"][0]["label"] == "blue" and answer["labels"][0]["share"] > 0.9
    assert sum(one["share"] for one in answer["labels"]) == pytest.approx(1)
    assert answer["results"][0]["label"] == "blue"
    assert [layer["layer"] for layer in answer["routing"]] == ["visual_00", "visual_01", "generation_00"]
    assert answer["routing"][0]["patches"] == [[[2, 2, 3, 3]] * 4]
    assert answer["routing"][0]["shares"] == [0, 0, 0.5, 0.5]
    (view,) = answer["views"]
    assert view.startswith("data:image/png;base64,")


def test_an_uploaded_clip_gets_all_answers(server: PageServer) -> None:
    status, answer = upload(server, gif(["red", "white", "red"]))
    assert (status, answer["media"], answer["frames"], len(answer["views"])) == (200, "video", 3, 3)
    assert answer["caption"] == "a red picture"
    assert [grid[0] for grid in answer["routing"][0]["patches"]] == [[0] * 4, [3] * 4, [0] * 4]


def test_labels_can_be_chosen(server: PageServer) -> None:
    status, answer = upload(server, png(picture("red")), "?label=a+red+one&label=a+blue+one&label=a+red+one")
    assert status == 200
    assert [one["label"] for one in answer["labels"]] == ["a red one", "a blue one"]
    status, answer = post(server, "/api/sample", {"number": 0, "labels": ["blue", "red"]})
    assert (status, answer["labels"][0]["label"], answer["known"]["label"]) == (200, "red", "red")


def test_thumbnails(server: PageServer) -> None:
    status, headers, body = ask(server, "GET", "/api/thumbnail/0")
    assert (status, headers["Content-Type"], body[:4]) == (200, "image/png", b"\x89PNG")
    status, headers, body = ask(server, "GET", "/api/animation/13")
    assert (status, headers["Content-Type"], body[8:12]) == (200, "image/webp", b"WEBP")
    assert ask(server, "GET", "/api/thumbnail/14")[0] == 422


@pytest.mark.parametrize(
    "path", ["//etc/passwd", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/../server.py"]
)
@pytest.mark.parametrize("prefix", ["", "/api/thumbnail", "/api/animation", "/page.css"])
def test_no_path_reaches_a_file(server: PageServer, path: str, prefix: str) -> None:
    status, _, body = ask(server, "GET", prefix + path)
    assert status == 404
    assert "is not there" in json.loads(body)["error"]


def test_other_hosts_and_other_origins_get_nothing(server: PageServer) -> None:
    for path in ("/", "/api/about"):
        status, _, body = ask(server, "GET", path, headers={"Host": "evil.example"})
        assert status == 421 and b"colours" not in body
    crossing = {**JSON, "Origin": "http://evil.example"}
    assert ask(server, "POST", "/api/text", b'{"text": "red"}', crossing)[0] == 403
    assert ask(server, "POST", "/api/text", b'{"text": "red"}', {"Content-Type": "text/plain"})[0] == 415
    assert ask(server, "PUT", "/")[0] == 501


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"text": ""}, "sentence: got none; type one"),
        ({"text": " \n "}, "sentence: got none; type one"),
        ({}, "sentence: got none"),
        ({"text": 3}, "sentence: got none"),
        ({"text": "x" * (LONGEST_TEXT + 1)}, "sentence: got 2,001 characters; allowed are 2,000; shorten it"),
    ],
)
def test_a_bad_sentence_gets_a_sentence(server: PageServer, asked: object, said: str) -> None:
    status, answer = post(server, "/api/text", asked)
    assert status == 422
    assert answer["error"].startswith(said)


@pytest.mark.parametrize("number", [None, True, -1, 14, 1.5, "0", "x" * 1000])
def test_a_bad_number_gets_a_sentence(server: PageServer, number: object) -> None:
    status, answer = post(server, "/api/sample", {"number": number})
    assert status == 422
    assert answer["error"].endswith("allowed are 0 to 13")


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"text": "a", "text"}'])
def test_a_body_that_is_no_object_gets_a_sentence(server: PageServer, body: bytes) -> None:
    status, _, answer = ask(server, "POST", "/api/text", body, JSON)
    assert status == 400
    assert json.loads(answer)["error"].startswith("body: got")


def test_bad_files_and_labels_get_a_sentence(server: PageServer) -> None:
    assert upload(server, b"a text file")[1]["error"].startswith("picture: got a file that is neither")
    assert upload(server, b"")[1]["error"].startswith("picture: got an empty file")
    assert upload(server, png(picture("red", (1, 1))))[1]["error"].startswith("picture: got 1 x 1 pixels")
    many = [str(number) for number in range(MOST_LABELS + 1)]
    found = post(server, "/api/sample", {"number": 0, "labels": many})
    assert found[0] == 422 and found[1]["error"].startswith("labels: got 1,001")
    assert post(server, "/api/sample", {"number": 0, "labels": "red"})[0] == 400


def test_what_is_too_large_is_refused_unread(server: PageServer) -> None:
    for path, largest, kind in (("/api/picture", LARGEST_UPLOAD, PNG), ("/api/text", LARGEST_JSON, JSON)):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=patience.seconds(30))
        connection.putrequest("POST", path)
        for name, value in {**kind, "Content-Length": str(largest + 1)}.items():
            connection.putheader(name, value)
        connection.endheaders()
        reply = connection.getresponse()
        assert (reply.status, reply.headers["Connection"]) == (413, "close")
        assert "MiB" in json.loads(reply.read())["error"]
        connection.close()


def test_broken_requests_do_not_end_it(server: PageServer) -> None:
    for raw in (b"\0\xff\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"POST /api/text HTTP/1.1\r\nContent-Length: 9\r\n", b""):
        with socket.create_connection(server.server_address[:2], timeout=patience.seconds(10)) as raw_socket:
            raw_socket.sendall(raw)
    assert ask(server, "GET", "/")[0] == 200
    assert server.failures == []


def test_many_at_once_are_answered_one_model_call_at_a_time(tmp_path: Path) -> None:
    model = ColourModel()
    with served(tmp_path, model) as server:
        found: list[tuple[int, str]] = []

        def type_one(name: str) -> None:
            status, answer = post(server, "/api/text", {"text": name})
            found.append((status, answer["results"][0]["label"] + name))

        threads = [threading.Thread(target=type_one, args=(name,)) for name in ("red", "green", "blue") * 5]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == sorted((200, name * 2) for name in ("red", "green", "blue") * 5)
        assert model.at_once == 1


def test_a_run_without_heads_says_so_and_gives_the_rest(tmp_path: Path) -> None:
    with served(tmp_path, ColourModel(writes=False)) as server:
        _, answer = upload(server, png(picture("red")))
        assert answer["caption"] == {
            "why": "caption: got a stage that writes no texts; allowed is one that trains 'lm'; choose another"
        }
        assert answer["labels"][0]["label"] == "red" and answer["results"][0]["label"] == "red"


def test_a_run_without_embeddings_still_shows_its_experts(tmp_path: Path) -> None:
    with served(tmp_path, ColourModel(embeds=False)) as server:
        status, answer = post(server, "/api/text", {"text": "red"})
        assert status == 200
        assert answer["results"]["why"].startswith("encode_text: got a stage without trained embeddings")
        assert answer["routing"][0]["words"] == [{"word": "red", "expert": 0}]


def test_our_own_failure_is_a_sentence_and_the_console_has_the_rest(
    server: PageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Answers, text: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(Answers, "text", fails)
    status, answer = post(server, "/api/text", {"text": "red"})
    assert (status, answer) == (500, {"error": "the server failed at this request; its console says how"})
    (told,) = server.failures
    assert "a mistake of ours" in told and "Traceback" in told
    server.failures.clear()
    monkeypatch.undo()
    assert post(server, "/api/text", {"text": "red"})[0] == 200


def test_a_port_in_use_and_a_foreign_address_are_refused(server: PageServer) -> None:
    port = server.server_address[1]
    for host, wanted in (("127.0.0.1", port), ("192.0.2.1", 0), ("no.such.host.invalid", 0)):
        with pytest.raises(UserError, match=f"^--host {host} --port {wanted}: got .*change one"):
            PageServer(host, wanted, server.answers, print)


def test_too_many_connections_are_told_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MOST_CONNECTIONS", 1)
    with served(tmp_path, ColourModel()) as server:
        with socket.create_connection(server.server_address[:2], timeout=patience.seconds(10)) as first:
            first.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert first.recv(12) == b"HTTP/1.1 200"
            assert ask(server, "GET", "/")[0] == 503
        limit = patience.Limit(10)
        while ask(server, "GET", "/")[0] == 503:
            assert not limit.passed(), "the place never became free"
