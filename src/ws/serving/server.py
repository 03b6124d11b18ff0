"""An OpenAI-compatible server with a strength per request, over one engine.

    POST /v1/chat/completions, /v1/completions     `steer` says the strengths; streaming, logprobs, n, stop, seed
    GET  /v1/models                                 the base, and the base with each direction at 1
    GET, POST /v1/directions, DELETE .../{name}     list, load and unload directions while it runs
    GET  /metrics, /health                          for Prometheus; /health needs no key

A client that goes away frees its row. Without a key, only requests that name this machine as host are answered, so that
a web page cannot reach the server under a name of its own.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ws.base.errors import UserError
from ws.serving import metrics
from ws.serving.addresses import is_loopback
from ws.serving.engine import Engine
from ws.serving.protocol import ApiError, Body, Call, Writer, chat_call, completion_call
from ws.serving.requests import Answer, Piece, Request, Ticket
from ws.serving.shelf import Shelf, require_name

MOST_BYTES = 4 * 2**20
"""Longest body."""
MOST_WAITING = 2_000
"""Requests that may wait; further ones are refused."""

Endpoint = Callable[[HttpRequest], Awaitable[Response]]


class Server:
    """The endpoints over a shelf and a running engine."""

    def __init__(self, shelf: Shelf, engine: Engine) -> None:
        self.shelf, self.engine = shelf, engine

    def app(self, key: str | None = None) -> Starlette:
        """The application. key: what clients must send as bearer token; None only for a loopback address."""
        routes = [
            Route("/v1/chat/completions", functools.partial(self._complete, chat_call), methods=["POST"]),
            Route("/v1/completions", functools.partial(self._complete, completion_call), methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/v1/directions", self._directions, methods=["GET"]),
            Route("/v1/directions", self._load, methods=["POST"]),
            Route("/v1/directions/{name:path}", self._unload, methods=["DELETE"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(_Gate, key=key)],
            exception_handlers={ApiError: _refused, HTTPException: _no_such_place, Exception: _broken},
        )

    # ---------------------------------------------------------------- completions

    async def _complete(self, parse: Callable[[bytes, Shelf, Engine], Call], http: HttpRequest) -> Response:
        call = parse(await _body(http), self.shelf, self.engine)
        if self.engine.waiting >= MOST_WAITING:
            raise ApiError(429, "too many requests are waiting; try again later", code="queue_full")
        writer = Writer(call, self.shelf.model)
        running = _Running(self.engine, call.requests)
        if call.streams:
            return StreamingResponse(_events(running, writer), media_type="text/event-stream")
        whole = asyncio.ensure_future(running.answers())
        gone = asyncio.ensure_future(_disconnected(http))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                return Response(status_code=499)  # nobody reads it
            answers = whole.result()
        finally:
            running.cancel()
            whole.cancel()
            gone.cancel()
        if problem := next((answer.problem for answer in answers if answer.finish == "error"), ""):
            raise ApiError(500, f"the answer could not be written: {problem}")
        return JSONResponse(writer.whole(answers))

    # ---------------------------------------------------------------- models and directions

    async def _models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self._names()]})

    async def _model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        if name not in self._names():
            raise ApiError(404, f"the model {name!r} does not exist", "model", "model_not_found")
        return JSONResponse(self._described(name))

    def _names(self) -> list[str]:
        base = self.shelf.model.slug
        return [base, *(f"{base}@{name}" for name in self.shelf.directions)]

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "weight-steering",
                "max_model_len": self.engine.longest}  # fmt: skip

    async def _directions(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._direction(name) for name in self.shelf.directions]})

    def _direction(self, name: str) -> dict[str, Any]:
        direction = self.shelf.directions[name]
        return {"id": name, "object": "direction", "layers": direction.layer_numbers, "rank": direction.rank,
                "base": direction.base}  # fmt: skip

    async def _load(self, http: HttpRequest) -> Response:
        body = Body(await _body(http), {"name", "run"})
        name, run = body.text("name"), body.text("run")

        def load() -> None:
            require_name(name)
            self.shelf.put(name, self.shelf.inside(run))

        try:
            await run_in_threadpool(load)
        except UserError as error:
            raise ApiError.of(error, "run") from None
        return JSONResponse(self._direction(name), status_code=201)

    async def _unload(self, http: HttpRequest) -> Response:
        try:
            direction = self.shelf.take(http.path_params["name"])
        except UserError as error:
            raise ApiError.of(error, "name") from None
        self.engine.forget(direction)
        return JSONResponse({"id": http.path_params["name"], "object": "direction", "deleted": True})

    # ---------------------------------------------------------------- for operators

    async def _metrics(self, _: HttpRequest) -> Response:
        return PlainTextResponse(metrics.text(self.engine), media_type=metrics.CONTENT_TYPE)

    async def _health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "model": self.shelf.model.slug})


# -------------------------------------------------------------------- from the engine to the loop of the server


class _Running:
    """The requests of a call while they are answered; their pieces cross from the engine's thread."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._count = len(requests)
        try:
            for number, request in enumerate(requests):
                self._tickets.append(engine.submit(request, functools.partial(self._deliver, number)))
        except UserError as error:
            self.cancel()
            raise ApiError.of(error, "messages") from None

    def cancel(self) -> None:
        """Free the rows of requests that are still running."""
        for ticket in self._tickets:
            ticket.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all requests as they come, each with the number of its request."""
        left = self._count
        while left:
            number, piece = await self._pieces.get()
            left -= piece.finish is not None
            yield number, piece

    async def answers(self) -> list[Answer]:
        """All answers, in the order of the requests."""
        found: list[list[Piece]] = [[] for _ in range(self._count)]
        async for number, piece in self.pieces():
            found[number].append(piece)
        return [Answer.of(pieces) for pieces in found]

    def _deliver(self, number: int, piece: Piece) -> None:
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (number, piece))
        except RuntimeError:  # the loop is closed: nobody waits for this any more
            self.cancel()


async def _events(running: _Running, writer: Writer) -> AsyncIterator[str]:
    """Server-sent events of a streamed call. Leaving early, when the client is gone, cancels its requests."""
    count = len(writer.call.requests)
    characters, tokens, begun = [0] * count, [0] * count, [False] * count
    try:
        async for number, piece in running.pieces():
            if piece.finish == "error":
                yield _event(ApiError(500, f"the answer could not be written: {piece.problem}").body)
                return
            if piece.text or piece.tokens or piece.finish or not begun[number]:
                yield _event(writer.chunk(number, piece, characters[number], first=not begun[number]))
            begun[number] = True
            characters[number] += len(piece.text)
            tokens[number] += len(piece.tokens)
        if writer.call.tells_usage:
            yield _event(writer.last(tokens))
        yield "data: [DONE]\n\n"
    finally:
        running.cancel()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _body(http: HttpRequest) -> bytes:
    """The body, which must be JSON (a web form cannot send that to another site) and of bounded length."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the content type must be application/json")
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size > MOST_BYTES:
            raise ApiError(413, f"the body is longer than {MOST_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


# -------------------------------------------------------------------- who may come in


class _Gate:
    """Checks the key, or without one the name of the host, before anything else is done."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] == "http" else None
        await (self._app if problem is None else JSONResponse(problem.body, problem.status))(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self._key is None:
            host = headers.get(b"host", "").rpartition(":")[0] or headers.get(b"host", "")
            if not is_loopback(host.strip("[]")):
                return ApiError(403, f"this server answers only to localhost, not to {host!r}")
            return None
        if scope["path"] == "/health":
            return None
        sent = headers.get(b"authorization", "").encode("latin-1")
        if not hmac.compare_digest(sent, f"Bearer {self._key}".encode("utf-8", "surrogateescape")):
            return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        return None


async def _refused(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status)


async def _no_such_place(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}")
    return JSONResponse(problem.body, problem.status, headers=error.headers)


async def _broken(_: HttpRequest, error: Exception) -> Response:
    return JSONResponse(ApiError(500, f"internal error ({type(error).__name__})").body, 500)


def run(server: Server, listener: socket.socket, key: str | None = None) -> None:
    """Answer requests until interrupted."""
    import uvicorn  # noqa: PLC0415 - optional extra, late

    config = uvicorn.Config(server.app(key), log_level="warning", timeout_graceful_shutdown=1, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])
