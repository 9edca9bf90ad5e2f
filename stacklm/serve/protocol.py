"""The completions endpoint of the OpenAI API: format of requests and responses.

Parameters that are not implemented are refused by name: none is ignored silently.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from starlette.exceptions import HTTPException
from starlette.responses import Response

from stacklm.config.evaluate import Sample
from stacklm.config.schema import ParamsError, nearest, read
from stacklm.serve.completion import Piece

MOST_CHOICES = 128
"""Maximum number of completions per request: prompts times `n`."""
STRICT = ConfigDict(extra="forbid", strict=True)


class StreamOptions(BaseModel):
    model_config = STRICT

    include_usage: bool = False


class Completions(BaseModel):
    """The parameters of a request. `null` is the same as omitting a parameter."""

    model_config = STRICT

    model: str
    prompt: list[str | Annotated[list[int], Field(min_length=1)]] = [""]
    max_tokens: int = Field(16, ge=0)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    n: int = Field(1, ge=1)
    stop: list[Annotated[str, Field(min_length=1)]] = Field([], max_length=4)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    suffix: Any = None
    best_of: Any = 1
    logit_bias: Any = {}
    presence_penalty: Any = 0
    frequency_penalty: Any = 0

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, said: Any) -> Any:
        if not isinstance(said, dict):
            return said
        return {key: value for key, value in said.items() if value is not None or key not in cls.model_fields}

    @field_validator("prompt", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        several = isinstance(value, list) and bool(value) and all(isinstance(one, (str, list)) for one in value)
        return value if several else [value]

    @field_validator("stop", mode="before")
    @classmethod
    def _as_stops(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("suffix", "best_of", "logit_bias", "presence_penalty", "frequency_penalty")
    @classmethod
    def _not_implemented(cls, value: Any, info: Any) -> Any:
        if value != cls.model_fields[info.field_name].default:
            raise ValueError("not implemented; omit it")
        return value

    def sample(self, seed: int) -> Sample:
        """Return the sampling settings; raises `Refusal` if they are outside the bounds of `evaluate.sample`."""
        asked = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": seed}
        try:
            return replace(read(Sample, asked), max_new_tokens=self.max_tokens)
        except ParamsError as error:
            raise Refusal(400, str(error), str(error).partition(":")[0]) from None


class Refusal(HTTPException):
    """An error response. `param` names the parameter at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, wait: int = 0) -> None:
        super().__init__(status, message, {"Retry-After": str(wait)} if wait else None)
        self.param, self.code = param, code


def error_body(error: HTTPException) -> dict[str, Any]:
    """Return an error in the API's format."""
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": error.detail, "type": kind, "param": param, "code": code}}


def error_response(error: HTTPException) -> Response:
    return Response(json.dumps(error_body(error)), error.status_code, error.headers, "application/json")


def invalid(error: RequestValidationError) -> Refusal:
    """Return the first error in a request."""
    first = error.errors()[0]
    place = first["loc"][1:]
    if first["type"] == "json_invalid" or not place:
        return Refusal(400, "the body is not a JSON object; send one with the header Content-Type: application/json")
    param, message = str(place[0]), first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown parameter{nearest(place[-1], Completions.model_fields)}"
    elif param == "prompt":
        message = "must be a text, a list of texts, a list of token ids, or a list of such lists"
    return Refusal(400, f"{'.'.join(str(part) for part in place)}: {message}", param)


def choice(index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return all or the next pieces of one completion in the API's format; `logprobs` is null if there are no tokens."""
    tokens = [token for piece in pieces for token in piece.tokens]
    logprobs = {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [token.top for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }
    text = "".join(piece.text for piece in pieces)
    return {"index": index, "text": text, "logprobs": logprobs if tokens else None, "finish_reason": pieces[-1].finish}


def event(content: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
