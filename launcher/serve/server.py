"""The web server of the page: three files, and answers as JSON. Only what stands in its tables is ever served."""

import json
import socket
import socketserver
import threading
import traceback
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from launcher.serve.answers import Answers
from launcher.serve.rules import (
    HEADERS,
    LARGEST_JSON,
    LARGEST_UPLOAD,
    RefusedError,
    body_length,
    check_host,
    check_origin,
)
from omnivl.errors import UserError
from omnivl.shown import printable

PAGE: Mapping[str, tuple[str, str]] = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/drawing.js": ("drawing.js", "text/javascript; charset=utf-8"),
    "/experts.js": ("experts.js", "text/javascript; charset=utf-8"),
}
"""Files of the page by the path that asks for them: no path reaches the file system."""

MOST_CONNECTIONS = 32
_SILENT_SECONDS = 30
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\nRetry-After: 1\r\n\r\n"


class PageServer(ThreadingHTTPServer):
    """Serves one page about one model, a thread for each connection, at most ``MOST_CONNECTIONS``."""

    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, host: str, port: int, answers: Answers, log: Callable[[str], None]) -> None:
        """Binds the address.

        Args:
            host: Address or name to listen on.
            port: 0 takes a free one.
            answers: Answers the page.
            log: Is told of failures that are our own.

        Raises:
            UserError: The address cannot be used.
        """
        self.answers, self.log, self.bound = answers, log, host
        self.pages = {
            path: ((files(__package__) / "page" / name).read_bytes(), kind) for path, (name, kind) in PAGE.items()
        }
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise UserError(
                f"--host {host} --port {port}: got {error.strerror or error}; allowed is an address of this machine "
                "and a port that nobody uses; change one (--port 0 takes a free port)"
            ) from error

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self.bound}]" if ":" in self.bound else self.bound
        return f"http://{host}:{self.server_address[1]}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread, or says that there are enough."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        try:
            request.sendall(_BUSY)
        except OSError:
            self.log("a browser was gone before it could be told that the server is busy")
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves a connection, then lets the next one in."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def server_bind(self) -> None:
        """Binds without asking a name server for this machine's name, which may take long without a network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.bound, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no failure, and nothing else ends here."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "omnivl", ""
    timeout = _SILENT_SECONDS

    def do_GET(self) -> None:
        self._guarded(self._get)

    def do_HEAD(self) -> None:
        self._guarded(self._get)

    def do_POST(self) -> None:
        self._guarded(self._post)

    def _get(self) -> None:
        path = urlsplit(self.path).path
        if path in self.server.pages:
            body, kind = self.server.pages[path]
            self._send(HTTPStatus.OK, kind, body)
        elif path == "/api/about":
            self._json(self.server.answers.about())
        elif path.startswith("/api/thumbnail/"):
            self._send(HTTPStatus.OK, "image/png", self.server.answers.thumbnail(_whole(path)))
        elif path.startswith("/api/animation/"):
            self._send(HTTPStatus.OK, "image/webp", self.server.answers.animation(_whole(path)))
        else:
            raise _absent(path)

    def _post(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/api/text":
            self._json(self.server.answers.text(self._asked().get("text")))
        elif url.path == "/api/sample":
            asked = self._asked()
            self._json(self.server.answers.sample(asked.get("number"), _label_list(asked.get("labels"))))
        elif url.path == "/api/picture":
            given = parse_qs(url.query, max_num_fields=2_000).get("label")
            self._json(
                self.server.answers.upload(self._body("image/|video/|application/octet-stream", LARGEST_UPLOAD), given)
            )
        else:
            raise _absent(url.path)

    def _asked(self) -> dict[str, Any]:
        """The body, a JSON object."""
        try:
            asked = json.loads(self._body("application/json", LARGEST_JSON))
        except (ValueError, RecursionError) as error:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "body: got no JSON; allowed is one object") from error
        if not isinstance(asked, dict):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "body: got JSON of another kind; allowed is one object")
        return asked

    def _body(self, kind: str, largest: int) -> bytes:
        length = body_length(self._named_headers(), kind, largest)
        body = self.rfile.read(length)
        if len(body) != length:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "body: got less than its Content-Length; send it again")
        self._is_read = True
        return body

    def _named_headers(self) -> dict[str, str]:
        """The headers by their names in the usual spelling, the first of each name."""
        return {name.title(): value for name, value in reversed(self.headers.items())}

    def _guarded(self, answer: Callable[[], None]) -> None:
        """Answers, whatever happens; after a request whose body was not read the connection is closed."""
        self._is_read = self.command != "POST"
        try:
            check_host(self.headers.get("Host"), self.server.bound)
            check_origin(self._named_headers())
            answer()
        except RefusedError as error:
            self._json({"error": str(error)}, error.status)
        except UserError as error:
            self._json({"error": str(error)}, HTTPStatus.UNPROCESSABLE_ENTITY)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception:
            self.server.log(f"{self.command} {printable(self.path)[:200]} failed\n{traceback.format_exc()}")
            self._json(
                {"error": "the server failed at this request; its console says how"}, HTTPStatus.INTERNAL_SERVER_ERROR
            )

    def _json(self, answer: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, "application/json", json.dumps(answer).encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}.items():
            self.send_header(name, value)
        if not self._is_read:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged: what people type is theirs."""


def _whole(path: str) -> int:
    """The number at the end of a path."""
    text = path.rpartition("/")[2]
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise _absent(path)
    return int(text)


def _label_list(labels: object) -> list[str] | None:
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise RefusedError(HTTPStatus.BAD_REQUEST, "labels: got something else; allowed is a list of texts")
    return labels


def _absent(path: str) -> RefusedError:
    return RefusedError(HTTPStatus.NOT_FOUND, f"{printable(path)[:80]!r} is not there; the page is at /")
