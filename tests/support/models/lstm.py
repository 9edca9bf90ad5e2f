"""Two LSTM layers with dropout between them: `features` and `head`, and a cache of two vectors per layer."""

from torch import nn


class LSTM(nn.Module):
    def __init__(self, vocab_size, context_length, width=32, layers=2, dropout=0.1):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.rnn = nn.LSTM(width, width, layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(width, vocab_size)

    def features(self, ids):
        return self.rnn(self.embed(ids))[0]

    def forward(self, ids):
        return self.head(self.features(ids))

    def decode(self, ids, cache=None):
        x, cache = self.rnn(self.embed(ids), cache)
        return self.head(x), cache
