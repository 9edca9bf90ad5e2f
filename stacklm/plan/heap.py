"""What the C library holds for a process whose blocks come and go as told.

A freed block is not always memory given back. In glibc, blocks below a threshold, which grows up to 32 MB as blocks are
freed, lie in one heap. torch asks for aligned blocks, of whose slack small objects take hold, so that a hole rarely takes a
block of its own size again: processes were measured to hold up to 1.7 times of what was in use. No formula gives this, so the
library is asked: it hands out blocks that nobody touches, which take addresses but no memory.
"""

from __future__ import annotations

import ctypes

LARGEST_IN_HEAP = 32 * 2**20
"""Above this glibc maps each block by itself, and gives it back at once (mallopt(3), M_MMAP_THRESHOLD)."""
ALIGNMENT = 64
"""Of torch's blocks on a CPU."""


class _Info(ctypes.Structure):
    """`struct mallinfo2`; `arena` are the bytes of the heap, `hblkhd` those of mapped blocks."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    )


class Heap:
    """Blocks of this process that are never touched. To be used in a process of its own: other objects fill holes too."""

    def __init__(self) -> None:
        """Raises `OSError` where the C library cannot be asked: only glibc from 2.33 on can."""
        self._library = ctypes.CDLL(None)
        try:
            self._library.mallinfo2.restype = _Info
            self._library.posix_memalign.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t)
            self._library.free.argtypes = (ctypes.c_void_p,)
        except AttributeError:
            raise OSError("this C library does not tell what it holds") from None
        self._large = 0
        self._before = self._held()
        self.peak = 0

    def allocate(self, size: int) -> int:
        """A block of that many bytes: its address, or 0 for one that lies in no heap. Raises `MemoryError`."""
        block = ctypes.c_void_p()
        if size > LARGEST_IN_HEAP:
            self._large += size
        elif self._library.posix_memalign(ctypes.byref(block), ALIGNMENT, max(size, 1)):
            raise MemoryError(f"no addresses left for a block of {size:,} bytes")
        self.peak = max(self.peak, self._held() - self._before)
        return block.value or 0

    def free(self, address: int, size: int) -> None:
        """Give back a block of `allocate`."""
        if address:
            self._library.free(address)
        else:
            self._large -= size

    def _held(self) -> int:
        info = self._library.mallinfo2()
        return info.arena + info.hblkhd + self._large
