"""Examples shown at the end of every command's `--help`."""

from __future__ import annotations

import typer

EXAMPLES = {
    "doctor": ["stacklm doctor"],
    "init": ["stacklm init my-lab"],
    "leak": ["stacklm leak", "stacklm leak --out leaks"],
    "try": [
        "stacklm try stacked",
        "stacklm try my_model.py --set settings.width=64",
        "stacklm try stacked --steps 60 --looks 3,5 --yes",
        "stacklm try stacked --json --seeds 3",
    ],
    "verify": ["stacklm verify default", "stacklm verify default 1aa80417"],
    "run-flow": [
        "stacklm run-flow pretrain",
        "stacklm run-flow pretrain --model dense --set train.max_steps=600",
        "stacklm run-flow lab short-convolution",
    ],
    "status": ["stacklm status", "stacklm status --quiet"],
    "accept": ['stacklm accept pretrain --reason "renamed a local variable"'],
    "report": ["stacklm report"],
    "ui": ["stacklm ui", "stacklm ui --port 5001"],
    "sync": ["stacklm sync"],
    "params": ["stacklm params", "stacklm params --set train.max_steps=200", "stacklm params --schema"],
    "plan": ["stacklm plan --memory 8GB", "stacklm plan --preset seed-2x64 --set train.micro_batch_size=2 --memory 8GB"],
    "claims": ["stacklm claims", "stacklm claims --write docs/claims.md"],
    "audit": [
        "stacklm audit --model dense",
        "stacklm audit out/models/dense-1",
        "stacklm audit my_model.py:MyModel --set n_layers=2 --context-length 64",
        "stacklm audit hf:openai-community/gpt2",
    ],
    "variants": ["stacklm variants", "stacklm variants --preset seed-2x64 --axis flops"],
    "generate": ['stacklm generate "def "', 'stacklm generate "import " --model dense-2 --temperature 0 --max-new-tokens 40'],
    "register": ["stacklm register dense --alias production"],
    "load": ["stacklm load dense-1", "stacklm load models:/stacklm@production"],
    "export hf": ["stacklm export hf exported dense-1 --license mit"],
    "serve": ["stacklm serve", "stacklm serve --model dense-2 --port 8001 --seed 1"],
    "benchmark": [
        "stacklm benchmark dense --blimp blimp.jsonl.zst --limit 50",
        "stacklm benchmark out/models/dense-1 --lambada lambada_test.jsonl --wikitext wiki.test.raw --json",
    ],
    "stage": ["stacklm stage shards", "stacklm stage pretrain dense 1"],
    "dvc-yaml": ["stacklm dvc-yaml"],
    "lab plan": ["stacklm lab plan short-convolution", "stacklm lab plan default --latency"],
    "lab run": ["stacklm lab run short-convolution"],
    "lab status": ["stacklm lab status default"],
    "lab show": ["stacklm lab show", "stacklm lab show default"],
    "lab accept": ['stacklm lab accept default --reason "renamed a local variable"'],
    "lab correlate": ["stacklm lab correlate text khop"],
}
"""Examples by command. A test checks that the parser accepts each of them."""


def add_examples(app: typer.Typer, group: str = "") -> None:
    """Append the examples to the help of all commands of `app`, subcommands included."""
    for command in app.registered_commands:
        name = group + (command.name or str(command.callback and command.callback.__name__))
        paragraphs = [command.epilog, "Examples:", *EXAMPLES.get(name, [])]
        command.epilog = "\n\n".join(filter(None, paragraphs))  # one paragraph per example, since lines of a paragraph are joined
    for below in app.registered_groups:
        if below.typer_instance and below.name:
            add_examples(below.typer_instance, f"{below.name} ")
