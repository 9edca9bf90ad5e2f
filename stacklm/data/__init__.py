"""Data: from a source of text to batches of token ids.

`sources` and `formats` read documents (bytes), `download` splits them and keeps them in `documents`, `tokenizer`
learns a vocabulary, `encode` writes token shards, `shards` reads them back and `batches` cuts them into windows.
The last two need numpy and torch only.
"""


class DataError(ValueError):
    """Text, a vocabulary or token shards that cannot be used; the message says what is wrong and what to do."""
