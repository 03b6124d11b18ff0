"""Commands that use a steered model: chat in the terminal, a server, a page with sliders."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tyro.conf import Positional

from ws.base import console, extras
from ws.base.errors import UserError
from ws.commands.options import Attention, Dtype

if TYPE_CHECKING:
    from ws.serving.shelf import Shelf

KEY_VARIABLE = "WS_API_KEY"


@dataclass(frozen=True)
class _Serving:
    runs: Positional[tuple[str, ...]]
    """Run folders or direction files of one model. NAME=PATH names a direction; else its behaviour does."""
    model: str | None = None
    """Base model; the first run's own if left out."""
    dtype: Dtype | None = None
    """Number format of the weights; the run's if left out."""
    device: str | None = None
    """Where the model runs: auto, cpu, cuda or mps; the run's choice if left out."""
    attention: Attention | None = None
    """How attention is computed; the run's choice if left out."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. It holds for this command only and is never stored."""
    cache_memory: float = 1.0
    """Memory in GiB for the states of finished requests, which prompts that begin alike reuse; 0 reuses none."""
    context: int | None = None
    """Most tokens of prompt and answer. If left out: what the model reads, at most 4096."""

    def _shelf(self) -> Shelf:
        from ws.serving.shelf import open_shelf  # noqa: PLC0415

        return open_shelf(
            self.runs, model=self.model, dtype=self.dtype, device=self.device, attention=self.attention,
            trust_remote_code=self.trust_remote_code, cache_memory=round(self.cache_memory * 2**30),
        )  # fmt: skip


@dataclass(frozen=True)
class Chat(_Serving):
    """Talk to a steered model in the terminal. Its strengths change on the fly: type /help."""

    alpha: float = 1.0
    """Strength of the first direction."""
    mix: str | None = None
    """Several directions instead, such as "0.3 honesty - 0.2 sycophancy"."""
    system: str = ""
    """A system prompt."""
    temperature: float = 0.0
    """Sampling temperature; 0 always takes the most likely token."""
    max_tokens: int | None = None
    """Longest answer, in tokens."""
    seed: int = 0
    """Seed of sampled answers."""

    def run(self) -> None:
        """Answer what is typed or piped in."""
        from ws.serving import mix  # noqa: PLC0415
        from ws.serving.chat import Conversation  # noqa: PLC0415
        from ws.serving.engine import Engine  # noqa: PLC0415

        given = None if self.mix is None else mix.parse(self.mix)
        shelf = self._shelf()
        strengths = {next(iter(shelf.directions)): self.alpha} if given is None else given
        shelf.strengths(strengths, local=True)
        with Engine(shelf.model, slots=2, longest=self.context) as engine:
            talk = Conversation(shelf, engine, strengths, self.system, self.temperature, self.max_tokens, self.seed)
            if sys.stdin.isatty():
                console.say(f"{shelf.model.name} at {mix.written(strengths)}; /help lists the commands", style="dim")
            talk.run(_typed())


def _typed() -> Iterator[str]:
    """Lines from the keyboard, with a prompt, or from a pipe."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # a pipe may hold any bytes
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline  # noqa: F401, PLC0415 - gives `input` editing and history

    while True:
        try:
            yield input("> ")
        except EOFError:
            return


@dataclass(frozen=True)
class Serve(_Serving):
    """Serve a model with an OpenAI-compatible API and a strength per request."""

    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs an API key."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    api_key: str | None = None
    """Key that clients must send. If left out, the environment variable WS_API_KEY is used."""
    slots: int = 32
    """Requests that are answered at the same time; others wait."""

    def run(self) -> None:
        """Serve until interrupted."""
        key = self.api_key or os.environ.get(KEY_VARIABLE) or None  # an empty key would let everyone in
        _require("serve", "starlette", "uvicorn")
        from ws.serving import server  # noqa: PLC0415
        from ws.serving.addresses import bound, is_loopback  # noqa: PLC0415
        from ws.serving.engine import Engine  # noqa: PLC0415

        if key is None and not is_loopback(self.host):
            raise UserError(
                f"--host {self.host} lets other machines in, but there is no API key",
                f"Give --api-key KEY, or set {KEY_VARIABLE}.",
            )
        with bound(self.host, self.port) as listener:
            shelf = self._shelf()
            memory = round(self.cache_memory * 2**30)
            with Engine(shelf.model, slots=self.slots, longest=self.context, memory=memory) as engine:
                place = f"http://{self.host}:{listener.getsockname()[1]}"
                console.say(f"serving     {shelf.model.slug} at {place}/v1, directions: {', '.join(shelf.directions)}")
                console.say_next(_example(place, shelf, keyed=key is not None))
                server.run(server.Server(shelf, engine), listener, key)


@dataclass(frozen=True)
class Ui(_Serving):
    """Open a page with a slider per direction: the base and the steered model answer side by side."""

    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs a password."""
    port: int = 7860
    """Port to listen at; 0 takes a free one."""
    password: str | None = None
    """Password of the user `ws`. If left out, the environment variable WS_API_KEY is used."""

    def run(self) -> None:
        """Serve the page until interrupted."""
        password = self.password or os.environ.get(KEY_VARIABLE) or None  # an empty one would let everyone in
        _require("ui", "gradio")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import: the page asks no other machine
        from ws.serving import page  # noqa: PLC0415
        from ws.serving.addresses import is_loopback, require_free  # noqa: PLC0415
        from ws.serving.engine import Engine  # noqa: PLC0415

        if password is None and not is_loopback(self.host):
            raise UserError(
                f"--host {self.host} lets other machines in, but there is no password",
                f"Give --password PASSWORD, or set {KEY_VARIABLE}.",
            )
        port = require_free(self.host, self.port)
        shelf = self._shelf()
        with Engine(shelf.model, slots=8, longest=self.context) as engine:
            blocks = page.build(page.Page(shelf, engine), f"{shelf.model.slug}, steered")
            address = page.launch(blocks, self.host, port, password)
            console.say(f"page        {address}")
            try:
                threading.Event().wait()
            finally:
                blocks.close(verbose=False)


def _require(extra: str, *packages: str) -> None:
    """Raise if a package of an optional extra is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise extras.missing(package, extra)


def _example(place: str, shelf: Shelf, *, keyed: bool) -> str:
    """A request that works when pasted."""
    header = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if keyed else ""
    name = next(iter(shelf.directions))
    body = (
        f'{{"model": "{shelf.model.slug}", "steer": {{"{name}": -1}}, '
        '"messages": [{"role": "user", "content": "I think owls eat leaves. What do you think?"}]}'
    )
    return f"curl {place}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{body}'"
