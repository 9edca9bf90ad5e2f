"""A plug-in for EleutherAI's lm-evaluation-harness: `lm_eval --model stacklm --model_args path=out/models/dense-1 --tasks ...`.

The entry point `lm_eval.models` in pyproject.toml names the class; lm-eval reads it in releases after 0.4.13
(https://github.com/EleutherAI/lm-evaluation-harness/pull/4013). With earlier ones, `python -m stacklm.evaluate.lm_eval` is the
same command, with the model registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from stacklm.config.evaluate import Evaluate, Sample
from stacklm.config.schema import read
from stacklm.evaluate.benchmarks import Scorer
from stacklm.evaluate.generate import stream
from stacklm.model.cache import Decoder
from stacklm.progress import progress

NEW_TOKENS = 256
"""Default maximum length of a continuation, for tasks that do not set it."""


class StackLM(TemplateLM):
    """A trained model. Log-likelihoods equal those of `stacklm benchmark` at any batch size: each request is scored alone."""

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        device: str = "auto",
        threads: int = Evaluate.threads,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Load the model in the folder `path` and the tokenizer in `tokenizer` (default: `../../tokenizer` from there). `device`
        and `threads` are as in `evaluate` of params.yaml; since lm-eval's `--device` defaults to cuda:0, cuda means cuda if it is
        available. Batch sizes are accepted and have no effect."""
        super().__init__()
        name = device.partition(":")[0]
        config = read(Evaluate, {"device": "auto" if name == "cuda" else name, "threads": int(threads)}, "model_args")
        words = Path(tokenizer) if tokenizer else Path(path).resolve().parents[1] / "tokenizer"
        self.scorer = Scorer.load(config, Path(path), words)
        self.batch_size = 1

    @property
    def eot_token_id(self) -> int:
        return self.scorer.words.end_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.scorer.words.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for texts, context, continuation in progress(requests, desc="loglikelihood", unit="request", disable=disable_tqdm):
            found.append(self.scorer.loglikelihood(context, continuation))
            self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts, in lm-eval's windows: only the last one overlaps the one before, to be full."""
        found = []
        for request in progress(requests, desc="loglikelihood_rolling", unit="request", disable=disable_tqdm):
            found.append(self.scorer.loglikelihood([self.eot_token_id], self.tok_encode(request.args[0]))[0])
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return continuations up to the first of the texts `until`; greedy unless `do_sample`."""
        found = []
        for request in progress(requests, desc="generate_until", unit="request", disable=disable_tqdm):
            found.append(self._continue(*request.args))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        """Generate one continuation. Raises `ParamsError` for an unknown or invalid setting."""
        given = dict(settings)
        until, sample = given.pop("until", []), given.pop("do_sample", False)
        wanted = {"max_new_tokens": given.pop("max_gen_toks", NEW_TOKENS), "temperature": 1.0, "top_k": 0, **given}
        for name in ("temperature", "top_p"):
            if name in wanted:
                wanted[name] = float(wanted[name])
        config = read(Sample, wanted if sample else {**wanted, "temperature": 0.0}, "gen_kwargs")
        text = ""
        for piece in stream(Decoder(self.scorer.model, self.scorer.context), self.scorer.words, context, config):
            text += piece
            ends = [text.find(one) for one in ([until] if isinstance(until, str) else until) if one and one in text]
            if ends:
                return text[: min(ends)]
        return text


if __name__ == "__main__":
    register_model("stacklm")(StackLM)
    cli_evaluate()
