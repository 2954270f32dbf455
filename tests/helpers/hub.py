"""A Hub on this machine, which takes every commit and says what was in it."""

from __future__ import annotations

import base64
import contextlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class _Hub(BaseHTTPRequestHandler):
    """Knows one model, lets everybody write to it, and has none of its files and no data set."""

    def do_GET(self):
        is_model = self.path.startswith("/api/models/")
        self._answer({"id": self.server.repository} if is_model else None)

    def do_HEAD(self):
        self._answer(None)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.sent[self.path] = body
        answer: dict = {
            "url": f"http://{self.headers['Host']}/{self.server.repository}"
        }
        answer |= {"commitUrl": f"{answer['url']}/commit/0", "commitOid": "0"}
        if "/preupload/" in self.path:
            how = {"uploadMode": "regular", "shouldIgnore": False}
            answer["files"] = [file | how for file in json.loads(body)["files"]]
        self._answer(answer)

    def _answer(self, answer):
        content = json.dumps(answer or {"error": "not found"}).encode()
        self.send_response(404 if answer is None else 200)
        if answer is None:
            kind = "Repo" if self.path.startswith("/api/") else "Entry"
            self.send_header("X-Error-Code", f"{kind}NotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running_hub(repository: str):
    """Run one that has this repository of a model; yield the variables that send a command there, and what `uploaded` takes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.sent, server.repository = {}, repository
    Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    try:
        variables = {"HF_ENDPOINT": place, "HF_HUB_OFFLINE": 0, "HF_TOKEN": "hf_made"}
        yield variables, server.sent
    finally:
        server.shutdown()
        server.server_close()


def uploaded(sent, repository: str) -> dict[str, bytes]:
    """Return the files of the commit to a model's repository, by their paths."""
    lines = sent[f"/api/models/{repository}/commit/main"].splitlines()
    return {
        row["value"]["path"]: base64.b64decode(row["value"]["content"])
        for row in map(json.loads, lines)
        if row["key"] == "file"
    }
