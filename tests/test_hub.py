"""Directions on a hub: through huggingface_hub's own calls, to a stand-in that speaks the hub's HTTP interface."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from making import assert_one_line, random_direction
from ws.algebra import hub
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.model.loading import ChatModel

TOKEN = "hf_standin"
COMMIT = "c" * 40


@dataclass
class StandIn:
    """Repositories by name, each a mapping of file names to bytes; writing needs the token."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)


def handler_of(stand_in: StandIn) -> type[BaseHTTPRequestHandler]:
    """Answers the hub's calls for making a repository, committing files, and reading one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._json(401, {"error": "Invalid username or password."})
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                stand_in.repositories.setdefault(name, {})
                visibility = asked.get("visibility")
                stand_in.private[name] = visibility == "private" if visibility else bool(asked.get("private"))
                self._json(200, {"url": f"{stand_in.url}/{name}"})
            elif self.path == "/api/validate-yaml":
                self._json(200, {"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                         for one in json.loads(body)["files"]]  # fmt: skip
                self._json(200, {"files": files})
            elif "/commit/" in self.path:
                name = self.path.removeprefix("/api/models/").split("/commit/")[0]
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        stand_in.repositories[name][line["value"]["path"]] = content
                self._json(
                    200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{stand_in.url}/{name}/commit/{COMMIT}"}
                )
            else:
                self._json(404, {"error": self.path})

        def do_GET(self) -> None:
            name, _, rest = self.path.lstrip("/").partition("/resolve/")
            content = stand_in.repositories.get(name, {}).get(rest.partition("/")[2])
            if content is None:
                self._json(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
                return
            self.send_response(200)
            for label, value in {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT,
                                 "Content-Length": str(len(content)), "Accept-Ranges": "bytes"}.items():  # fmt: skip
                self.send_header(label, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

        def log_message(self, *_: object) -> None:
            pass

        def _json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            for label, value in {"Content-Type": "application/json", "Content-Length": str(len(body)),
                                 **(headers or {})}.items():  # fmt: skip
                self.send_header(label, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    found = StandIn()
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(found))
    found.url = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=lambda: running.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    yield found
    running.shutdown()
    running.server_close()
    thread.join()


def test_what_is_pushed_comes_back_the_same_with_a_card(stand_in: StandIn, qwen: ChatModel) -> None:
    direction = random_direction(qwen)
    address = direction.push_to_hub("me/honesty", private=True, token=TOKEN, endpoint=stand_in.url)
    assert "me/honesty" in address and stand_in.private["me/honesty"]
    files = stand_in.repositories["me/honesty"]
    assert set(files) == {hub.FILE, "README.md"}
    card = files["README.md"].decode()
    assert direction.base in card and "Direction.from_pretrained" in card and "tags: [weight-steering]" in card
    back = Direction.from_pretrained("me/honesty", endpoint=stand_in.url)
    assert back.content_key == direction.content_key and back.provenance == direction.provenance


def test_pushing_again_replaces_the_file(stand_in: StandIn, qwen: ChatModel) -> None:
    for seed in (0, 1):
        random_direction(qwen, seed=seed).push_to_hub("me/x", token=TOKEN, endpoint=stand_in.url)
    back = Direction.from_pretrained("me/x", endpoint=stand_in.url)
    assert back.content_key == random_direction(qwen, seed=1).content_key


def test_a_folder_or_file_is_read_without_a_hub(qwen: ChatModel, tmp_path: Path) -> None:
    direction = random_direction(qwen)
    direction.save(tmp_path / hub.FILE)
    for place in (tmp_path, tmp_path / hub.FILE, str(tmp_path)):
        assert Direction.from_pretrained(place).content_key == direction.content_key
    with pytest.raises(UserError, match="no direction file"):
        Direction.from_pretrained(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("repo", "token", "writes"), [("me/nothing", TOKEN, False), ("me/x", "wrong", True), ("not a name!", TOKEN, True)]
)
def test_a_failure_of_the_hub_is_one_line(
    stand_in: StandIn, qwen: ChatModel, repo: str, token: str, writes: bool
) -> None:
    with pytest.raises(UserError) as caught:
        if writes:
            random_direction(qwen).push_to_hub(repo, token=token, endpoint=stand_in.url)
        else:
            Direction.from_pretrained(repo, token=token, endpoint=stand_in.url)
    assert_one_line(caught.value, repo)
    assert token not in str(caught.value)


def test_an_unreachable_hub_is_one_line(qwen: ChatModel, stand_in: StandIn) -> None:
    with pytest.raises(UserError) as caught:
        random_direction(qwen).push_to_hub("me/x", token=TOKEN, endpoint="http://127.0.0.1:9")
    assert_one_line(caught.value, "me/x", "on the hub")
