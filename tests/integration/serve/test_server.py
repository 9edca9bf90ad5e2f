"""The server with common clients: `openai`, and plain HTTP for requests that `openai` cannot send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from stacklm.config.evaluate import Evaluate, Sample
from stacklm.evaluate.generate import continue_text
from stacklm.model.store import load_model
from stacklm.serve import server as server_module
from support import wait_for
from support.serving import Served, serving
from support.text_model import CONTEXT, write_text_models

MODEL = "stacked-1"
ENDLESS = {"model": MODEL, "prompt": "the", "max_tokens": 2**20, "n": 128}
"""A request that takes longer than any test: random weights end a document in some hundred tokens, but not so many of them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_models(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving(folder) as one:
        yield one


def generated(folder: Path, prompt: str, **sample: Any) -> str:
    """What `stacklm generate` says."""
    config = Evaluate(sample=Sample(**sample), device="cpu", threads=1)
    return "".join(continue_text(config, folder / "stacked", folder / "tokenizer", prompt, "kv"))


def post(served: Served, **body: Any) -> httpx.Response:
    content, headers = json.dumps({"model": MODEL, "prompt": "the"} | body), {"Content-Type": "application/json"}
    return httpx.post(f"{served.url}/v1/completions", content=content, headers=headers, timeout=60)


def test_a_seed_gives_the_text_of_generate_whole_and_streamed(served: Served, folder: Path) -> None:
    """Beyond the context of 16 tokens, too."""
    client = served.client()
    asked = {"model": MODEL, "prompt": "the sum", "max_tokens": 40, "temperature": 0.8, "top_p": 0.9, "seed": 1}
    whole = client.completions.create(**asked, extra_body={"top_k": 50})
    expected = generated(folder, "the sum", max_new_tokens=40, temperature=0.8, top_p=0.9, top_k=50, seed=1)
    assert whole.choices[0].text == expected and len(expected) > 20
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (40, 40 + whole.usage.prompt_tokens)
    *chunks, last = client.completions.create(
        **asked, extra_body={"top_k": 50}, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert len(chunks) > 20 and [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert last.usage == whole.usage and not last.choices
    assert last.system_fingerprint == whole.system_fingerprint != ""


def test_without_a_seed_each_request_has_its_own_and_says_it(served: Served) -> None:
    first, second = (post(served, max_tokens=30).json() for _ in range(2))
    assert first["choices"][0]["text"] != second["choices"][0]["text"]
    assert post(served, max_tokens=30, seed=first["seed"]).json()["choices"] == first["choices"]


def test_several_prompts_and_choices_are_those_of_their_own(served: Served, folder: Path) -> None:
    said = served.client().completions.create(model=MODEL, prompt=["the", "sum"], n=2, max_tokens=9, seed=3)
    expected = [generated(folder, p, max_new_tokens=9, temperature=1.0, top_k=0, seed=s) for p in ("the", "sum") for s in (3, 4)]
    assert [(one.index, one.text) for one in said.choices] == list(enumerate(expected))


def test_the_text_ends_before_a_stop_sequence(served: Served) -> None:
    client = served.client()
    asked = {"model": MODEL, "prompt": "the", "max_tokens": 40, "seed": 1}
    text = client.completions.create(**asked).choices[0].text
    stop = text[10:13]
    for stops in (stop, ["never said", stop]):
        said = client.completions.create(**asked, stop=stops).choices[0]
        assert said.text == text[: text.index(stop)] and said.finish_reason == "stop"
    streamed = [chunk.choices[0] for chunk in client.completions.create(**asked, stop=stop, stream=True)]
    assert "".join(one.text for one in streamed) == said.text and streamed[-1].finish_reason == "stop"


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_prompt_can_be_scored_as_lm_eval_does(served: Served, folder: Path, tokens: int) -> None:
    """Without drawing, and with the one token that it asks for and leaves out."""
    ids = [0, *served.engine.words.encode("the sum of 3")]
    asked = {"model": MODEL, "max_tokens": tokens, "echo": True, "logprobs": 1, "temperature": 0}
    said = served.client().completions.create(prompt=[ids, ids[:4]], **asked)
    model, _ = load_model(folder / "stacked")
    with torch.no_grad():
        logprobs_TV = model.eval()(torch.tensor([ids]))[0].log_softmax(-1)
    expected = [float(logprobs_TV[t, one]) for t, one in enumerate(ids[1:])]
    for choice, length in zip(said.choices, (len(ids), 4), strict=True):
        found = choice.logprobs
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        assert found.token_logprobs[1:length] == pytest.approx(expected[: length - 1], abs=1e-5)
        assert {len(found.tokens), len(found.token_logprobs), len(found.top_logprobs)} == {length + tokens}
        likeliest = [max(top.values()) for top in found.top_logprobs[1:length]]
        assert likeliest == pytest.approx(logprobs_TV.amax(-1)[: length - 1].tolist(), abs=1e-5)
    text = served.client().completions.create(prompt="the sum of 3", **asked).choices[0]
    spelled = said.choices[0].logprobs.tokens[1 : len(ids)]
    assert text.text.startswith("the sum of 3") and text.logprobs.tokens[: len(ids) - 1] == spelled
    assert text.logprobs.token_logprobs[: len(ids) - 1] == pytest.approx(expected, abs=1e-5)


def test_the_offsets_are_those_of_the_text(served: Served) -> None:
    asked = {"model": MODEL, "prompt": "né sum", "max_tokens": 30, "seed": 1, "echo": True, "logprobs": 0}
    choice = served.client().completions.create(**asked).choices[0]
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
    streamed = served.client().completions.create(**asked, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    assert [token for part in parts if part for token in part.tokens] == choice.logprobs.tokens


def test_half_of_a_surrogate_pair_is_read_as_its_bytes(served: Served) -> None:
    said = post(served, prompt="a\ud800", max_tokens=0, echo=True, logprobs=0).json()["choices"][0]
    assert said["logprobs"]["tokens"] == ["a", "bytes:\\xed", "bytes:\\xa0", "bytes:\\x80"]
    assert said["text"] == "a\ufffd\ufffd\ufffd"


def test_models(served: Served) -> None:
    client = served.client()
    assert [one.id for one in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).model_extra["context_length"] == CONTEXT
    with pytest.raises(openai.NotFoundError, match="no model 'stacked-2' on this server"):
        client.models.retrieve("stacked-2")
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt", prompt="a")
    assert error.value.code == "model_not_found" and error.value.param == "model"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"max_tokns": 3}, "max_tokns", "unknown parameter (did you mean `max_tokens`?)"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": 2**21}, "max_tokens", "2097152 exceeds 1048576, the limit of this server"),
        ({"temperature": -0.5}, "temperature", "-0.5 is not allowed; it must be >= 0"),
        ({"temperature": 1e-300}, "temperature", "float32"),
        ({"top_p": 0}, "top_p", "must be > 0 and <= 1"),
        ({"top_k": -1}, "top_k", "must be >= 0"),
        ({"seed": -1}, "seed", "must be >= 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "129 completions, n per prompt, exceed the limit of 128"),
        ({"stop": list("abcde")}, "stop", "at most 4 items"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"suffix": "x"}, "suffix", "not implemented"),
        ({"best_of": 2}, "best_of", "not implemented"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not implemented"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not implemented"),
        ({"frequency_penalty": -1}, "frequency_penalty", "not implemented"),
        ({"stream_options": {"x": 1}}, "stream_options", "unknown parameter"),
        ({"model": None}, "model", "required"),
        ({"prompt": 5}, "prompt", "must be a text, a list of texts, a list of token ids, or a list of such lists"),
        ({"prompt": []}, "prompt", "must be a text"),
        ({"prompt": [[1, True]]}, "prompt", "must be a text"),
        ({"prompt": [3, 260]}, "prompt", "260 is not a token id of this vocabulary, 0 to 259"),
        ({"prompt": [-1]}, "prompt", "-1 is not a token id"),
        ({"prompt": "x" * 99}, "prompt", f"tokens exceed the model's context length of {CONTEXT}"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_an_error_that_names_the_parameter(served: Served, body, param, message, stream) -> None:
    answer = post(served, stream=stream, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert message in error["message"] and error["message"].startswith(param)


def test_null_and_neutral_values_are_the_same_as_nothing(served: Served) -> None:
    neutral = {"suffix": None, "best_of": 1, "logit_bias": {}, "presence_penalty": 0.0, "frequency_penalty": 0, "stop": None}
    said = post(served, seed=1, max_tokens=None, temperature=None, n=None, stream=None, logprobs=None, user="me", **neutral)
    assert said.json()["choices"] == post(served, seed=1, max_tokens=16).json()["choices"]
    assert post(served, prompt=None, seed=1).json()["choices"] == post(served, prompt="", seed=1).json()["choices"]


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"content": b"{"}, 400, "not a JSON object"),
        ({"content": b'{"model": "stacked-1"}', "headers": {"Content-Type": "text/plain"}}, 400, "Content-Type: application/json"),
        ({"json": []}, 400, "not a JSON object"),
        ({"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, 400, "body"),
        ({"content": b"x" * (4 << 20) + b"x"}, 413, "at most 4,194,304 bytes"),
        ({"content": iter([b"{}"])}, 413, "Content-Length header"),
        ({"json": {}, "headers": {"Origin": "https://elsewhere.example"}}, 403, "pages of https://elsewhere.example"),
        ({"json": {}, "headers": {"Origin": "null"}}, 403, "pages of null"),
    ],
)
def test_requests_that_are_none(served: Served, request_: dict[str, Any], status: int, message: str) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", **request_)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_only_names_of_this_machine_are_answered(served: Served) -> None:
    """A page elsewhere can let its own name lead to 127.0.0.1."""
    assert httpx.get(f"{served.url}/v1/models", headers={"Host": "elsewhere.example"}).status_code == 400
    assert httpx.get(served.url.replace("127.0.0.1", "localhost") + "/v1/models").status_code == 200
    assert "access-control-allow-origin" not in httpx.get(f"{served.url}/v1/models", headers={"Origin": served.url}).headers


def test_unknown_addresses_are_errors_of_the_same_form(served: Served) -> None:
    assert httpx.get(f"{served.url}/v1/chat").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{served.url}/v1/completions").status_code == 405


def test_requests_wait_for_their_turn_and_a_client_that_leaves_frees_it(served: Served) -> None:
    running = served.client().completions.create(**ENDLESS, stream=True)
    next(iter(running))
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(post, served, max_tokens=1)
        wait_for(lambda: httpx.get(f"{served.url}/health").json()["requests"] == 2, seconds=10)
        assert not waiting.done()
        running.close()
        assert waiting.result(timeout=20).json()["usage"]["completion_tokens"] == 1
    wait_for(lambda: served.engine.inside == 0, seconds=10)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_may_leave_while_it_waits_and_while_its_request_is_in_work(served: Served, stream: bool) -> None:
    running = served.client().completions.create(**ENDLESS, stream=True)
    next(iter(running))
    impatient = served.client(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(**ENDLESS, stream=stream)
    wait_for(lambda: served.engine.inside == 1, seconds=10)
    running.close()
    wait_for(lambda: served.engine.inside == 0, seconds=10)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(**ENDLESS)
    wait_for(lambda: served.engine.inside == 0, seconds=10)
    assert post(served, max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_more_than_may_wait_are_told_to_come_again(served: Served, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(server_module, "MOST_WAITING", 0)
    running = served.client().completions.create(**ENDLESS, stream=True)
    next(iter(running))
    refused = post(served, stream=stream)
    running.close()
    assert refused.status_code == 503 and refused.headers["Retry-After"] == "5"
    assert refused.json()["error"]["type"] == "server_error"
    wait_for(lambda: served.engine.inside == 0, seconds=10)
    assert post(served, stream=stream).status_code == 200


def test_a_server_that_stops_ends_streams_with_an_error(folder: Path) -> None:
    with serving(folder) as served:
        running = served.client().completions.create(**ENDLESS, stream=True)
        next(iter(running))
        served.server.should_exit = True
        with pytest.raises(openai.APIError, match="shutting down"):
            list(running)


def test_the_servers_own_seed_and_limit(folder: Path) -> None:
    with serving(folder, max_tokens=20, seed=5) as served:
        texts = [post(served, max_tokens=20).json()["choices"][0]["text"] for _ in range(2)]
        assert texts == [generated(folder, "the", max_new_tokens=20, temperature=1.0, top_k=0, seed=5)] * 2
        assert "max_tokens: 21 exceeds 20" in post(served, max_tokens=21).json()["error"]["message"]


def test_a_failure_is_an_error_of_the_same_form(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(served.engine.decoder, "features", broken)
    answer = post(served)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert served.engine.inside == 0
