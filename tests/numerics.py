"""Run the numerical tests with the kernels of other processors: `make test-numerics`.

Three things differ between machines: torch's own kernels, those of the libraries for matrix products (oneDNN and MKL, numpy's
OpenBLAS), and the number of threads. Every pair of values of two of these is tested, in 6 runs instead of 12. Only older kernels
than those of the processor can be selected: newer ones need a newer machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

OWN = {}
AVX2_PRODUCTS = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "OPENBLAS_CORETYPE": "Haswell"}
MACHINES = [
    (1, OWN, None),
    (2, AVX2_PRODUCTS, None),
    (2, OWN, "default"),
    (1, AVX2_PRODUCTS, "default"),
    (1, OWN, "avx2"),
    (2, AVX2_PRODUCTS, "avx2"),
]


def main() -> int:
    files = [str(path) for path in Path(__file__).parent.rglob("test_*.py") if "mark.numerical" in path.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "numerical", *sys.argv[1:], *sorted(files)]
    failed = 0
    for threads, products, own_kernels in MACHINES:
        asked = {**products, **({"ATEN_CPU_CAPABILITY": own_kernels} if own_kernels else {})}
        workers = min(4, (os.cpu_count() or 1) // threads)
        print(f"\n{threads} threads, {' '.join(f'{name}={value}' for name, value in asked.items()) or 'own kernels'}", flush=True)
        done = subprocess.run(
            [*command, "-n", str(workers if workers > 1 else 0)],
            env={**os.environ, **asked, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        )
        failed += done.returncode != 0
    print(f"\n{len(MACHINES) - failed} of {len(MACHINES)} configurations passed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
