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
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
    *("--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe"),
)


def find_chromium() -> str | None:
    """Return the program of a Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Page:
    """One tab, spoken to in the DevTools protocol through two pipes.

    `errors` are what its scripts threw and what its policy refused, `requests` the addresses that
    it asked for.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._received, self._number = b"", 0
        self._tab: dict[str, str] = {}
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        tab = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._tab = {"sessionId": tab["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._tab}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file: Path, **look: Any) -> None:
        """Open a file, seen as `look` has it, and wait until it is loaded."""
        self.errors, self.requests = [], []
        self.look(**look)
        self.run("window.before = 1")
        self.send("Page.navigate", url=file.as_uri())
        self.wait("!window.before && document.readyState == 'complete'")

    def look(self, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Show the page at a size in pixels, in a colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.send("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.send("Emulation.setEmulatedMedia", features=[feature])
        # In the first frame the page hears of its new size, in the second it has begun to draw.
        frame = "requestAnimationFrame"
        self.run(f"new Promise((done) => {frame}(() => {frame}(done)))")

    def run(self, script: str) -> Any:
        """Return the value of an expression of JavaScript."""
        how = {"returnByValue": True, "awaitPromise": True}
        result = self.send("Runtime.evaluate", expression=script, **how)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"{condition} never held; {self.errors}"
            time.sleep(0.02)

    def choose(self, control: str, value: str) -> None:
        """Give a control a value, as somebody does who clicks or types."""
        self.run(
            f"((e) => {{ e.value = {value!r}; for (const name of ['input', 'change'])"
            " e.dispatchEvent(new Event(name, {bubbles: true})); })"
            f"(document.querySelector({control!r}))"
        )

    def screenshot(self, file: Path, width: int, height: int) -> None:
        """Write so many pixels from the top left of the page as PNG."""
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.send(
            "Page.captureScreenshot", captureBeyondViewport=True, clip=clip
        )
        file.write_bytes(base64.b64decode(shot["data"]))

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready = select.select([self._read], [], [], PATIENCE)[0]
            part = os.read(self._read, 1 << 20) if ready else b""
            assert part, "the browser does not answer"
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
    to_browser, write = os.pipe()
    read, from_browser = os.pipe()
    words = [str(find_chromium()), *OPTIONS, f"--user-data-dir={folder / 'profile'}"]
    # The browser reads from descriptor 3 and writes to 4.
    command = f"exec {shlex.join(words)} 3<&{to_browser} 4>&{from_browser}"
    quiet = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    ends = (to_browser, from_browser)
    with subprocess.Popen(["bash", "-c", command], pass_fds=ends, **quiet) as process:
        for end in ends:
            os.close(end)
        try:
            yield Page(write, read)
        finally:
            process.terminate()
            os.close(write)
            os.close(read)
