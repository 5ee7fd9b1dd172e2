"""What a process does first when it will hold keys: no dumps of its memory, no swapping of it where that is allowed."""

from __future__ import annotations

import ctypes
import os
import resource
from typing import Final

from sealift.errors import MemoryUnprotected

_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4
_CAP_IPC_LOCK: Final = 14


def forbid_dumps() -> None:
    """Make this process neither dump core nor be read by others of the same user; raises MemoryUnprotected.

    To be called after the last change of user and the last exec, both of which the kernel answers by making a process
    dumpable again. Children start dumpable.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as error:
        raise _unprotected(f"core dumps could not be switched off: {error}") from None
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise _unprotected(f"PR_SET_DUMPABLE was refused: {os.strerror(ctypes.get_errno())}")
    if libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise _unprotected("PR_SET_DUMPABLE had no effect")


def lock_memory() -> bool:
    """Keep this process's memory out of swap, page by page as it is used; False where that is not allowed.

    A limit that is merely high is no permission: with it every later allocation beyond the limit would fail.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and not _may_lock():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0)


def _may_lock() -> bool:
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


def _unprotected(what: str) -> MemoryUnprotected:
    return MemoryUnprotected(what, todo="look for a seccomp or container rule that forbids prctl or setrlimit")
