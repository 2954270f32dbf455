"""A headless Chromium that tests open pages in, without a driver or a network."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shlex
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Seconds that a page, or an answer of the browser, may take.
PATIENCE = 60
#: Keys that do something of their own in a page only with their code.
_CODES = {"Tab": 9, " ": 32, "ArrowRight": 39}


def find_chromium() -> str | None:
    """Return the program of a Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Page:
    """One tab, spoken to in the DevTools protocol through two pipes.

    Attributes:
        errors: What the page's scripts threw, and what its policy refused.
        requests: Addresses that it asked for.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._received = b""
        self._number = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, file: Path, **look: Any) -> None:
        """Open a file, seen as `look` has it, and wait until it is loaded."""
        self.look(**look)
        self.send("Page.navigate", url=file.as_uri())
        self.wait(
            f"location.href == {file.as_uri()!r} && document.readyState == 'complete'"
        )

    def look(
        self,
        width: int = 1280,
        height: int = 900,
        scheme: str = "light",
        media: str = "screen",
    ) -> None:
        """Show the page at a size in pixels, in a colour scheme, on a medium."""
        self._width = width
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.send("Emulation.setEmulatedMedia", media=media, features=[feature])
        # In the first frame the page hears of its new size, in the second it has begun to draw.
        frame = "requestAnimationFrame"
        self.run(f"new Promise((done) => {frame}(() => {frame}(done)))")

    def run(self, script: str) -> Any:
        """Return the value of an expression of JavaScript."""
        result = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"])[:2000])
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition} never held; {self.errors}")
            time.sleep(0.02)

    def key(self, key: str) -> None:
        """Press a key such as ``ArrowDown``, ``Home`` or ``/``."""
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=_CODES.get(key, 0),
                **(text if kind == "keyDown" else {}),
            )

    def point(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, file: Path, height: int | None = None) -> None:
        """Write what is visible as PNG, or so many pixels from the top of the page down."""
        clip = {"x": 0, "y": 0, "width": self._width, "height": height, "scale": 1}
        whole = {} if height is None else {"captureBeyondViewport": True, "clip": clip}
        data = self.send("Page.captureScreenshot", format="png", **whole)["data"]
        file.write_bytes(base64.b64decode(data))

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            if not select.select([self._read], [], [], PATIENCE)[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise EOFError("the browser has ended")
            self._received += part
        line, _, self._received = self._received.partition(b"\0")
        message = json.loads(line)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message


@contextlib.contextmanager
def chromium_page(folder: Path) -> Iterator[Page]:
    """Give a tab of a browser that keeps its profile in `folder`."""
    program = find_chromium()
    assert program is not None
    to_browser, write = os.pipe()
    read, from_browser = os.pipe()
    words = [
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder / 'profile'}",
    ]
    # The browser reads from descriptor 3 and writes to 4.
    command = f"exec {shlex.join(words)} 3<&{to_browser} 4>&{from_browser}"
    with subprocess.Popen(
        ["bash", "-c", command],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield Page(write, read)
        finally:
            os.close(write)
            os.close(read)
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
