"""stacklm: the laboratory for stacked-parallel decoder language models."""

import os

# A thread that waits for others spins for some 0.05 ms and then sleeps. By default GNU OpenMP spins 300 times as long,
# which made training ten times slower whenever something else used the cores. It is read when torch is loaded, hence here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
