"""Data: from a source of text to batches of token ids.

    formats     local text files, read as documents of bytes, with counts of everything read
    sources     text sources: standard library, local files, datasets of the Hugging Face hub
    benchmarks  benchmark files as items to score
    inputs      stage `inputs`
    documents   the documents of a dataset on disk
    download    stage `download`: duplicates, near-duplicates, splits and their difficulty
    tokenizer   byte-level BPE, training and encoding; stage `tokenizer`
    encode      stage `shards`
    shards      reading token shards
    batches     batches of token sequences

The last two need only numpy and torch.
"""


class DataError(ValueError):
    """Text, a vocabulary or token shards that cannot be used; the message says what is wrong and what to do."""
