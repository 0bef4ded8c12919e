"""The C library's allocator."""

import ctypes
import platform

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


def recycle_memory() -> bool:
    """Makes malloc keep freed blocks, as GPU allocators do, for this whole process.

    By default glibc maps a large tensor afresh each time, and the page faults of its first use cost more than most
    kernels. Returns False where malloc is not glibc's.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))
