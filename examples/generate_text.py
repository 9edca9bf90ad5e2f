"""Load a trained model and continue a prompt.

python examples/generate_text.py [PROMPT] [MODEL-SEED]      after `dvc repro`, in the checkout
"""

import sys
from pathlib import Path

from stacklm.config.evaluate import Sample
from stacklm.data.tokenizer import Tokenizer
from stacklm.evaluate.generate import stream
from stacklm.model.cache import Decoder
from stacklm.model.store import load_model


def main(prompt: str = "def ", name: str = "stacked-1", out: Path = Path("out")) -> None:
    tokenizer = Tokenizer.load(out / "tokenizer")
    model, config = load_model(out / "models" / name, tokenizer.digest)  # fails for a wrong tokenizer or damaged weights
    decoder = Decoder(model.eval(), config.context_length)
    print(prompt, end="")
    for piece in stream(decoder, tokenizer, prompt, Sample(max_new_tokens=100, temperature=0.8, top_k=50, seed=1)):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:3])
