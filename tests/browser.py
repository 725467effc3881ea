"""A headless Chromium, driven over chromedriver's WebDriver protocol with the standard library alone."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import patience

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
_ANSWERED_SECONDS = 20
_KEYS = {"ENTER": "\ue007", "LEFT": "\ue012", "RIGHT": "\ue014", "DOWN": "\ue015", "TAB": "\ue004"}


def missing() -> str | None:
    """Why no browser can be started; None where one can."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"needs {' and '.join(lacking)} (Debian: chromium chromium-driver)" if lacking else None


class Browser:
    """One window."""

    def __init__(self, width: int = 1280, height: int = 1000) -> None:
        self._folder = tempfile.mkdtemp(prefix="chromium-")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._base = f"http://127.0.0.1:{port}"
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": self._folder},
            start_new_session=True,
        )
        try:
            self.until(lambda: self._ready(), "chromedriver never listened")
            arguments = [*_ARGUMENTS, f"--user-data-dir={self._folder}/profile", f"--window-size={width},{height}"]
            chrome = {"args": arguments, "binary": shutil.which("chromium")}
            told = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
            wants = {"alwaysMatch": {"browserName": "chrome", **told}}
            self._session = f"/session/{self._ask('POST', '/session', {'capabilities': wants})['sessionId']}"
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends it and all its processes."""
        if self._driver.poll() is None:
            os.killpg(self._driver.pid, signal.SIGKILL)
        self._driver.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, url: str) -> None:
        """Goes to a page."""
        self._ask("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """What a script returns."""
        return self._ask("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def texts(self, selector: str) -> list[str]:
        """The visible texts of the elements that are shown, in order."""
        return list(
            self.run(
                "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent).map(e => e.innerText)",
                selector,
            )
        )

    def press(self, selector: str, text: str) -> None:
        """Types into an element; ``{ENTER}`` and the like are keys, a path chooses a file."""
        for name, key in _KEYS.items():
            text = text.replace(f"{{{name}}}", key)
        self._ask("POST", f"{self._session}/element/{self._find(selector)}/value", {"text": text})

    def click(self, selector: str) -> None:
        """Clicks on an element."""
        self._ask("POST", f"{self._session}/element/{self._find(selector)}/click", {})

    def clear(self, selector: str) -> None:
        """Empties a field."""
        self._ask("POST", f"{self._session}/element/{self._find(selector)}/clear", {})

    def drag(self, selector: str, *way: tuple[int, int]) -> None:
        """Moves the pointer, held down, along points relative to an element's middle."""
        origin = {_ELEMENT: self._find(selector)}
        moves = [{"type": "pointerMove", "duration": 20, "x": x, "y": y, "origin": origin} for x, y in way]
        steps = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": steps}
        self._ask("POST", f"{self._session}/actions", {"actions": [pointer]})

    def resize(self, width: int, height: int) -> None:
        """Changes the window's size."""
        self._ask("POST", f"{self._session}/window/rect", {"width": width, "height": height})

    def console(self) -> list[dict[str, Any]]:
        """What the page, or the browser about it, has written to its console since this was last asked."""
        return list(self._ask("POST", f"{self._session}/se/log", {"type": "browser"}))

    def picture(self, path: Path) -> None:
        """Writes what is in the window as a PNG."""
        path.write_bytes(base64.b64decode(self._ask("GET", f"{self._session}/screenshot")))

    def until(self, holds: Callable[[], object], otherwise: str, seconds: float = _ANSWERED_SECONDS) -> None:
        """Waits until something holds."""
        limit = patience.Limit(seconds)
        while not holds():
            assert not limit.passed(), otherwise
            time.sleep(0.03)

    def _find(self, selector: str) -> str:
        found = self._ask("POST", f"{self._session}/element", {"using": "css selector", "value": selector})
        return str(found[_ELEMENT])

    def _ready(self) -> bool:
        try:
            return bool(self._ask("GET", "/status")["ready"])
        except OSError:
            return False

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(asked, timeout=patience.seconds(_ANSWERED_SECONDS)) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from error
