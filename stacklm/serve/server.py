"""The server: one model behind the completions endpoint of the OpenAI API, and a web page.

Requests generate one at a time, all on one thread; the others wait in a queue. The event loop only forwards the thread's output,
so the server stays responsive, and a request whose client has disconnected ends before its next token.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import secrets
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from stacklm.config.evaluate import Evaluate, Sample
from stacklm.config.schema import nearest
from stacklm.data.tokenizer import Tokenizer
from stacklm.evaluate.generate import open_decoder
from stacklm.files import read_json
from stacklm.model.cache import Decoder
from stacklm.model.store import CONFIG
from stacklm.serve.completion import Piece, Prompt, complete
from stacklm.serve.protocol import MOST_CHOICES, Completions, Refusal, choice, error_body, error_response, event, invalid

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_BYTES = 4 << 20
"""Maximum size of a request body."""
MOST_WAITING = 32
"""Maximum number of requests in the queue."""
GRACE = 5
"""Seconds that open connections get to end at shutdown."""


@dataclass
class Engine:
    """A model, the one thread that it runs on, and the queue of requests."""

    name: str
    decoder: Decoder
    words: Tokenizer
    fingerprint: str
    """Identifies the weights: with equal weights and seed the text is equal."""
    max_tokens: int
    seed: int | None
    """Seed of requests without one; None: a random seed for each."""
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    stopping: Callable[[], bool] = lambda: False
    inside: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    def open(cls, name: str, config: Evaluate, trained: Path, tokenizer: Path, max_tokens: int, seed: int | None) -> Engine:
        """Load the model in the folder `trained`. Raises as `open_decoder` does."""
        thread = ThreadPoolExecutor(1)
        decoder, words = thread.submit(open_decoder, config, trained, tokenizer).result()  # sets torch up for this thread
        return cls(name, decoder, words, read_json(trained / CONFIG)["sha256"][:12], max_tokens, seed, thread)

    def prompt(self, given: str | list[int]) -> Prompt:
        """Return the token ids of a prompt. Raises `Refusal` for unknown ids and for more tokens than the context."""
        text = isinstance(given, str)
        ids = [self.words.end_id, *self.words.encode(given)] if text else given
        if unknown := [one for one in ids if not 0 <= one < self.words.vocab_size]:
            message = f"prompt: {unknown[0]} is not a token id of this vocabulary, 0 to {self.words.vocab_size - 1}"
            raise Refusal(400, message, "prompt")
        if len(ids) > (context := self.decoder.cache.context):
            message = f"prompt: {len(ids)} tokens exceed the model's context length of {context}; shorten it"
            raise Refusal(400, message, "prompt", "context_length_exceeded")
        return Prompt(ids, hidden=int(text))

    @contextlib.asynccontextmanager
    async def turn(self, request: Request) -> AsyncIterator[None]:
        """Wait for all earlier requests. Raises `Refusal` if the queue is full or the client disconnects."""
        if self.inside > MOST_WAITING:
            raise Refusal(503, f"{MOST_WAITING} requests are already waiting; try again later", wait=5)
        self.inside += 1
        ticket = asyncio.ensure_future(self.lock.acquire())
        try:
            while not (await asyncio.wait([ticket], timeout=1))[0]:
                if await request.is_disconnected():
                    raise Refusal(499, "the client has disconnected")
            yield
        finally:
            self.inside -= 1
            if not ticket.cancel():
                self.lock.release()

    async def steps(self, work: Iterator[tuple[int, Piece]], request: Request) -> AsyncIterator[tuple[int, Piece]]:
        """Yield the items of `work`, computed on the thread, while the client is connected. Raises `Refusal` at shutdown."""
        loop = asyncio.get_running_loop()
        while not await request.is_disconnected():
            if self.stopping():
                raise Refusal(503, "the server is shutting down")
            if (step := await loop.run_in_executor(self.thread, next, work, None)) is None:
                return
            yield step


class Answer:
    """The response to a request, whole or as a stream."""

    def __init__(self, engine: Engine, asked: Completions, prompts: Sequence[Prompt], sample: Sample, request: Request) -> None:
        self.asked, self.prompts = asked, prompts
        self.about = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": engine.name,
            "system_fingerprint": engine.fingerprint,
            "seed": sample.seed,
        }
        self.drawn: dict[int, int] = {}
        self.steps = engine.steps(self._work(engine, sample), request)

    def _work(self, engine: Engine, sample: Sample) -> Iterator[tuple[int, Piece]]:
        """Yield the pieces of all choices, each with its index. Choice i of every prompt uses the seed + i."""
        asked = self.asked
        for index, (prompt, i) in enumerate(product(self.prompts, range(asked.n))):
            settings = replace(sample, seed=(sample.seed + i) % 2**63)
            for piece in complete(engine.decoder, engine.words, prompt, settings, asked.stop, asked.echo, asked.logprobs):
                self.drawn[index] = piece.drawn
                yield index, piece

    def _usage(self) -> dict[str, int]:
        read, written = sum(len(prompt.ids) - prompt.hidden for prompt in self.prompts), sum(self.drawn.values())
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def whole(self) -> dict[str, Any]:
        pieces: dict[int, list[Piece]] = {}
        async for index, piece in self.steps:
            pieces.setdefault(index, []).append(piece)
        return self.about | {"choices": [choice(*one) for one in pieces.items()], "usage": self._usage()}

    async def stream(self) -> AsyncIterator[str]:
        """Yield its events; the last one is an error if it was cut short."""
        try:
            async for index, piece in self.steps:
                if piece.text or piece.tokens or piece.finish:
                    yield event(self.about | {"choices": [choice(index, [piece])]})
            if self.asked.stream_options.include_usage:
                yield event(self.about | {"choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except HTTPException as error:
            yield event(error_body(error))


class InTurn(StreamingResponse):
    """A stream that starts when its turn comes; the turn ends with the stream or when the client disconnects."""

    def __init__(self, engine: Engine, request: Request, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.engine, self.request = engine, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.engine.turn(self.request):
            await super().__call__(scope, receive, send)


class Guard:
    """Refuses browser requests from pages of another origin, and bodies that are too long, before they are read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, answer = Headers(scope=scope), self.app
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            answer = error_response(Refusal(403, f"pages of {origin} may not use this server"))
        elif "transfer-encoding" in headers or int(headers.get("content-length", 0)) > MOST_BYTES:
            answer = error_response(Refusal(413, f"a request needs a Content-Length header of at most {MOST_BYTES:,} bytes"))
        await answer(scope, receive, send)


def application(engine: Engine, hosts: Sequence[str] = LOOPBACK) -> FastAPI:
    """Return the application, for requests whose header `Host` names one of `hosts`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.exception_handler(HTTPException)(lambda _, error: error_response(error))
    app.exception_handler(RequestValidationError)(lambda _, error: error_response(invalid(error)))
    app.exception_handler(Exception)(lambda _, error: error_response(Refusal(500, f"{type(error).__name__}; see the server's log")))
    page = (files("stacklm.serve") / "page.html").read_text(encoding="utf-8")
    model = {
        "id": engine.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "stacklm",
        "context_length": engine.decoder.cache.context,
        "max_tokens": engine.max_tokens,
    }

    def check_model(name: str) -> None:
        if name != engine.name:
            message = f"model: no model {name!r} on this server{nearest(name, [engine.name])}; it serves {engine.name}"
            raise Refusal(404, message, "model", "model_not_found")

    @app.get("/")
    async def front() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy(page)})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "requests": engine.inside}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        check_model(name)
        return model

    @app.post("/v1/completions")
    async def completions(asked: Completions, request: Request) -> Response:
        check_model(asked.model)
        if asked.max_tokens > engine.max_tokens:
            message = f"max_tokens: {asked.max_tokens} exceeds {engine.max_tokens}, the limit of this server"
            raise Refusal(400, message, "max_tokens")
        if (choices := len(asked.prompt) * asked.n) > MOST_CHOICES:
            raise Refusal(400, f"n: {choices} completions, n per prompt, exceed the limit of {MOST_CHOICES}", "n")
        seed = next(one for one in (asked.seed, engine.seed, secrets.randbits(31)) if one is not None)
        sample = asked.sample(seed)
        prompts = [await run_in_threadpool(engine.prompt, one) for one in asked.prompt]
        answer = Answer(engine, asked, prompts, sample, request)
        if asked.stream:
            return InTurn(engine, request, answer.stream())
        async with engine.turn(request):
            return JSONResponse(await answer.whole())

    return app


def policy(page: str) -> str:
    """Return a content security policy that allows only the page's own script and style, and requests to this server."""
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "frame-ancestors 'none'", "base-uri 'none'"]
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        rules.append(f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'")
    return "; ".join(rules)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 picks a free one. Raises `RuntimeError` if that fails."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]
        raise RuntimeError(f"cannot listen on {host}, port {port}: {why}; choose another with --port or --host") from None


def serve(listener: socket.socket, engine: Engine, hosts: Sequence[str] = LOOPBACK) -> None:
    """Serve requests until SIGINT or SIGTERM; running generations then end with an error, within `GRACE` seconds."""
    config = uvicorn.Config(application(engine, hosts), log_level="warning", lifespan="off", timeout_graceful_shutdown=GRACE)
    server = uvicorn.Server(config)
    engine.stopping = lambda: server.should_exit
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn after it has shut down
        server.run(sockets=[listener])
