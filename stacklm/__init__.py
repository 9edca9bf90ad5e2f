"""stacklm: the laboratory for stacked-parallel decoder language models."""

import os

# Threads that wait for each other sleep rather than spin. It costs nothing measurable alone, and where models train side
# by side on few cores, spinning made training ten times slower. OpenMP reads this when torch is loaded, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
