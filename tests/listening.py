"""A local HTTP server for tests that talk to a chat endpoint."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class QuietHandler(BaseHTTPRequestHandler):
    """Answers POST requests by `answer` of a subclass and logs nothing."""

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Read the request and reply."""
        raise NotImplementedError

    def log_message(self, *_: object) -> None:
        pass

    def posted(self) -> bytes:
        """Body of the request."""
        return self.rfile.read(int(self.headers["Content-Length"]))

    def reply(self, status: int, content: bytes) -> None:
        """Answer with a status and a body."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def listening(handler: type[QuietHandler], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a running server, up to and including /v1; no proxy and no key of the machine gets in the way."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=lambda: running.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    running.server_close()
    thread.join()
