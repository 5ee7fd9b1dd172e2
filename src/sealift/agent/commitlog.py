"""The durable record of who owns a VM after a switchover: a small preallocated file per attempt, written with O_DSYNC.

A full disk cannot stop a commit, because every slot is allocated before anything moves. Layout: 8 slots of 512 bytes,
filled in order, each one

    offset  size  field
    0       4     magic "SLCR"
    4       1     slot number
    5       1     mark (Mark)
    6       16    attempt id
    22      8     fence, big-endian
    30      8     time, microseconds since the epoch, big-endian
    38      442   zero
    480     32    SHA-256 over bytes 0-479

An empty slot is all zero. A slot that is neither empty nor whole is a torn write of the last mark: it never took
effect, because every effect waits for the write to return, so it reads as absent. With anything behind it, it is no
torn write but damage, and nothing is concluded from the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from uuid import UUID

from sealift.agent.durable import sync_directory
from sealift.domain.move import Role
from sealift.errors import IllegalTransition, SealiftError

SLOT_BYTES, SLOTS = 512, 8
_BODY = struct.Struct(">4sBB16sQQ")
_MAGIC = b"SLCR"


class Mark(IntEnum):
    """What became durable at one host in one attempt."""

    LET_GO = 1  # source: from here on only the target may run the guest, unless it answers ABORTED
    ABORTED = 2  # source: the guest stays here; target: its QEMU was killed and reaped, it will never run
    RELEASED = 3  # source: the target runs the guest
    READY = 4  # target: holds a complete paused copy
    COMMITTED = 5  # target: the guest is ours
    REVOKED = 6  # target: `cont` failed, the guest never ran, its QEMU was killed; counts as ABORTED


_AFTER: dict[Role, dict[Mark | None, frozenset[Mark]]] = {
    Role.SOURCE: {
        None: frozenset({Mark.LET_GO, Mark.ABORTED}),
        Mark.LET_GO: frozenset({Mark.ABORTED, Mark.RELEASED}),
    },
    Role.TARGET: {
        None: frozenset({Mark.READY, Mark.ABORTED}),
        Mark.READY: frozenset({Mark.COMMITTED, Mark.ABORTED}),
        Mark.COMMITTED: frozenset({Mark.REVOKED}),
    },
}


@dataclass(frozen=True)
class Entry:
    """One mark and when it was made, in seconds since the epoch."""

    mark: Mark
    at: float


def encode_slot(slot: int, mark: Mark, attempt: UUID, fence: int, at: float) -> bytes:
    """The 512 bytes of one slot."""
    body = _BODY.pack(_MAGIC, slot, mark, attempt.bytes, fence, int(at * 1e6)).ljust(SLOT_BYTES - 32, b"\0")
    return body + hashlib.sha256(body).digest()


def decode(raw: bytes, attempt: UUID, fence: int) -> list[Entry]:
    """The marks of a file, oldest first. Raises SealiftError for one that is damaged, or of another attempt."""
    entries = []
    for slot in range(min(SLOTS, len(raw) // SLOT_BYTES)):
        block = raw[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
        if hashlib.sha256(block[:-32]).digest() != block[-32:]:
            if any(raw[(slot + 1) * SLOT_BYTES :]):
                raise _damaged(attempt)
            break
        magic, number, mark, ident, seen, at = _BODY.unpack_from(block)
        if (magic, number, ident, seen) != (_MAGIC, slot, attempt.bytes, fence) or mark not in tuple(Mark):
            raise _damaged(attempt)
        entries.append(Entry(Mark(mark), at / 1e6))
    return entries


def _damaged(attempt: UUID) -> SealiftError:
    return SealiftError(
        f"the commit log of attempt {attempt} is damaged, or a newer agent wrote it",
        todo="look at both hosts before the VM is started anywhere",
    )


class CommitLog:
    """The file of one attempt at one host. ``path`` is made and allocated in full when the log is opened first."""

    def __init__(self, directory: Path, role: Role, attempt: UUID, fence: int) -> None:
        """Open or make the log; raises OSError when the room for it cannot be had, before anything moved."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.role, self.attempt, self.fence = role, attempt, fence
        self.path = directory / f"{fence:020d}-{attempt}-{role.value}.log"
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < SLOT_BYTES * SLOTS:
                # Written, not only allocated: a later overwrite then needs no new metadata on common file systems.
                if os.pwrite(fd, bytes(SLOT_BYTES * SLOTS), 0) != SLOT_BYTES * SLOTS:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(fd)
                sync_directory(directory)
            self.entries = decode(os.pread(fd, SLOT_BYTES * SLOTS, 0), attempt, fence)
        finally:
            os.close(fd)

    @property
    def last(self) -> Mark | None:
        """The newest mark, or None."""
        return self.entries[-1].mark if self.entries else None

    def write(self, mark: Mark, at: float) -> None:
        """Make ``mark`` durable; when this returns it is on the disk. Writing the newest mark again does nothing.

        Raises IllegalTransition, changing nothing, when the mark may not follow the newest one, and SealiftError when
        the disk failed: then the mark does not count, and the next write takes its slot.
        """
        if mark is self.last:
            return
        if mark not in _AFTER[self.role].get(self.last, frozenset()):
            raise IllegalTransition(f"attempt {self.attempt}: {mark.name} cannot follow {self.last and self.last.name}")
        slot = len(self.entries)
        block = encode_slot(slot, mark, self.attempt, self.fence, at)
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_DSYNC | os.O_CLOEXEC)
            try:
                written = os.pwrite(fd, block, slot * SLOT_BYTES)
            finally:
                os.close(fd)
        except OSError as error:
            raise SealiftError(f"{mark.name} could not be written to {self.path}: {error.strerror}") from error
        if written != SLOT_BYTES:
            raise SealiftError(f"{mark.name} was not written whole to {self.path}")
        self.entries.append(Entry(mark, at))


def let_go_by(directory: Path) -> UUID | None:
    """The attempt in which this host let the VM go for good or for an open question, or None if it may start here.

    ``directory`` holds one VM's logs.
    """
    for _, role, attempt, marks in _settled(directory):
        gone = Mark.RELEASED in marks or (Mark.LET_GO in marks and Mark.ABORTED not in marks)
        return attempt if role is Role.SOURCE and gone else None
    return None


def prune(directory: Path) -> None:
    """Remove the logs older than the one that decides; they can never be asked again."""
    for path, *_ in list(_settled(directory))[1:]:
        path.unlink()


def _settled(directory: Path) -> Iterator[tuple[Path, Role, UUID, frozenset[Mark]]]:
    """One VM's logs that say who owns it, newest attempt first.

    Each source log does. A target log does only when this host committed: an aborted target settled nothing about an
    older attempt, so the one before it is asked.
    """
    if not directory.is_dir():
        return
    for path in sorted(directory.glob("*.log"), reverse=True):
        fence, rest = path.stem.split("-", 1)
        ident, word = rest.rsplit("-", 1)
        attempt, role = UUID(ident), Role(word)
        marks = frozenset(entry.mark for entry in decode(path.read_bytes(), attempt, int(fence)))
        if role is Role.SOURCE or (Mark.COMMITTED in marks and Mark.REVOKED not in marks):
            yield path, role, attempt, marks
