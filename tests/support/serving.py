"""A server in a thread of the test, with a randomly initialised model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import uvicorn

from stacklm.config.evaluate import Evaluate
from stacklm.serve.server import Engine, application, listen
from support import wait_for


class Served:
    """A running server, and clients for it."""

    def __init__(self, engine: Engine, port: int, server: uvicorn.Server) -> None:
        self.engine, self.server = engine, server
        self.url = f"http://127.0.0.1:{port}"

    def client(self, **settings) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "any", "max_retries": 0, "timeout": 60} | settings)


@contextlib.contextmanager
def serving(folder: Path, max_tokens: int = 2**20, seed: int | None = None) -> Iterator[Served]:
    """Serve the model `stacked` of the folder, at a free port, until the block ends."""
    config = Evaluate(device="cpu", threads=1)
    engine = Engine.open("stacked-1", config, folder / "stacked", folder / "tokenizer", max_tokens, seed)
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(application(engine), log_level="warning", lifespan="off"))
        engine.stopping = lambda: server.should_exit
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        wait_for(lambda: server.started, seconds=30)
        try:
            yield Served(engine, listener.getsockname()[1], server)
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()
