"""Run folders made by hand, and a server over them in a thread, for the tests of chat, server and page."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from making import random_direction
from ws.base.files import write_json
from ws.model.loading import ChatModel
from ws.serving.engine import Engine
from ws.serving.shelf import Shelf


def made_run(model: ChatModel, out: Path, behaviour: str, seed: int = 0, *, norm: float = 0.3) -> Path:
    """A run folder with what chat, server and page read: the settings and a (random) direction."""
    run = out / model.slug / behaviour / "lora" / "seed0"
    run.mkdir(parents=True)
    write_json(run / "config.json", {"settings": {"model": model.name}, "behaviour": {"name": behaviour}})
    random_direction(model, seed=seed, relative_norm=norm).save(run / "direction.safetensors")
    return run


@dataclass(frozen=True)
class Served:
    """A server that is up. `url` ends in /v1."""

    url: str
    shelf: Shelf
    engine: Engine


@contextmanager
def serving(shelf: Shelf, *, key: str | None = None, slots: int = 64, longest: int | None = None) -> Iterator[Served]:
    """A server in a thread, at a free port of this machine."""
    import uvicorn  # noqa: PLC0415 - optional extra

    from ws.serving.addresses import bound  # noqa: PLC0415
    from ws.serving.server import Server  # noqa: PLC0415

    with bound("127.0.0.1", 0) as listener, Engine(shelf.model, slots=slots, longest=longest) as engine:
        config = uvicorn.Config(Server(shelf, engine).app(key), log_level="critical", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", shelf, engine)
        finally:
            server.should_exit = True
            thread.join(20)
