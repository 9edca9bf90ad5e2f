"""DVC's command line with its own messages separated: only they go to standard output.

    python -m stacklm.pipeline.repro --wait-for-lock repro ...

The stage that DVC runs inherits standard error for both of its streams, so that the calling process can show the
stage's output unchanged, and read from the other pipe what DVC did or why it failed.
"""

from __future__ import annotations

import os
import sys


def main() -> int:
    messages = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr = messages  # before dvc is imported, since its log handlers keep the streams of that moment
    from dvc.cli import main

    sys.argv[0] = "dvc"  # DVC names the holder of a lock by its command line
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
