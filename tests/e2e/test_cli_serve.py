"""`stacklm serve` as run by a user: the commands it prints work, it returns the text of `generate`, and it stops on request."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time

import httpx
import openai
import pytest

from stacklm.serve.server import listen
from support.checkout import Checkout


def started(finished: Checkout, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and what it prints before it waits."""
    command = [sys.executable, "-m", "stacklm", "serve", "--port", "0", *arguments]
    server = subprocess.Popen(
        command, cwd=finished.root, env=finished.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert server.stdout
    lines = []
    while not lines or "stop with" not in lines[-1]:
        lines.append(server.stdout.readline())
        assert lines[-1], "".join(lines)
    return server, "".join(lines)


@pytest.mark.parametrize("stop", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_what_it_prints_works_and_a_signal_ends_it_in_the_middle_of_a_stream(finished: Checkout, stop: signal.Signals) -> None:
    server, said = started(finished, "--model", "dense", "--max-tokens", "1000000")
    try:
        (url,) = re.findall(r"^dense-1: open (http://127.0.0.1:\d+) ", said, re.MULTILINE)
        (curl,) = (shlex.split(line) for line in said.splitlines() if line.startswith("  curl"))
        body = curl[-1].replace("}", ', "seed": 3, "temperature": 0.8, "top_k": 50}')
        answer = httpx.post(curl[1], headers=dict([curl[3].split(": ")]), content=body, timeout=60)
        settings = ("--max-new-tokens", "40", "--seed", "3", "--temperature", "0.8", "--top-k", "50")
        assert answer.json()["choices"][0]["text"] + "\n" == finished.cli("generate", "def ", "--model", "dense", *settings)

        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        stream = client.completions.create(model="dense-1", prompt="def ", max_tokens=1_000_000, n=100, stream=True)
        next(iter(stream))
        server.send_signal(stop)
        begun = time.monotonic()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert server.wait(timeout=20) == 0
        assert time.monotonic() - begun < 10
        assert server.stdout and server.stdout.read() == ""
    finally:
        server.kill()


def test_a_port_that_is_taken_is_one_clear_message(finished: Checkout) -> None:
    with listen("127.0.0.1", 0) as listener:
        port = str(listener.getsockname()[1])
        said = f"cannot listen on 127.0.0.1, port {port}: Address already in use; choose another with --port"
        assert said in finished.cli("serve", "--port", port, code=2)


@pytest.mark.slow
def test_another_address_than_this_machines_own_is_warned_of(finished: Checkout) -> None:
    server, said = started(finished, "--host", "0.0.0.0")
    try:
        assert "0.0.0.0 is not a loopback address: anyone who can reach it can use the model, without a key or encryption" in said
        (port,) = re.findall(r"http://0.0.0.0:(\d+)/", said)
        assert httpx.get(f"http://127.0.0.1:{port}/health", headers={"Host": "elsewhere.example"}).status_code == 200
    finally:
        server.terminate()
        assert server.wait(timeout=20) == 0
