"""Data: from a source of text to batches of token ids.

    formats     local files of text, read as documents of bytes, with an account of all that was read
    sources     where text comes from
    benchmarks  files of benchmarks as items to score
    inputs      stage `inputs`
    documents   the documents of a data set on disk
    download    stage `download`: duplicates, near-duplicates, splits and how hard they are
    tokenizer   a vocabulary, learned and used; stage `tokenizer`
    encode      stage `shards`
    shards      token shards, read
    batches     batches of token sequences

The last two need numpy and torch only.
"""


class DataError(ValueError):
    """Text, a vocabulary or token shards that cannot be used; the message says what is wrong and what to do."""
