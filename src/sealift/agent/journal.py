"""The agent's journal: every VM it holds, every move and conversion it was ordered to make, and for each VM the highest
fence seen and the newest configuration file written.

SQLite, one file. A row is written before the effect it stands for, so that after a crash the agent knows what it may
have begun, and an order repeated by the controller is answered instead of carried out twice. No secret is ever here:
a move's key lives in its relay and nowhere else, those of disks in the agent's memory (``agent.vault``).

The calls are short and synchronous on purpose: an effect may not start before its row is on the disk. Each raises
SealiftError when the disk fails.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

from pydantic import TypeAdapter

from sealift.agent.new_images import NewImage, Place
from sealift.domain.conversion import ConversionOrder, ConversionStatus
from sealift.domain.move import MOVE_FINAL, MoveOrder, MoveState, MoveStatus, Role
from sealift.domain.vm import HardwareRecord, VmConfig
from sealift.errors import SealiftError, StaleFence
from sealift.hypervisor.process import ProcessRef

_SCHEMA = """
CREATE TABLE vm (
    uuid TEXT PRIMARY KEY, name TEXT NOT NULL, config TEXT NOT NULL, hardware TEXT, process TEXT,
    wanted INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE move (
    attempt TEXT NOT NULL, role TEXT NOT NULL, vm TEXT NOT NULL, state TEXT NOT NULL, "order" TEXT NOT NULL,
    status TEXT NOT NULL, directory TEXT NOT NULL, process TEXT, PRIMARY KEY (attempt, role)
);
CREATE TABLE fence (vm TEXT PRIMARY KEY, fence INTEGER NOT NULL);
CREATE TABLE refused_attempt (attempt TEXT PRIMARY KEY);
"""
_ENCRYPTION = """
CREATE TABLE conversion (
    id TEXT PRIMARY KEY, "order" TEXT NOT NULL, status TEXT NOT NULL, images TEXT NOT NULL
);
CREATE TABLE vm_file (vm TEXT PRIMARY KEY, generation INTEGER NOT NULL, sha256 TEXT NOT NULL);
"""
_PLACES = """
ALTER TABLE conversion ADD COLUMN places TEXT NOT NULL DEFAULT '[]';
"""
_STEPS = (_SCHEMA, _ENCRYPTION, _PLACES)
"""What makes each version out of the one before. Rows of older versions stay as they are: what is new in their JSON has
defaults."""
_VERSION = len(_STEPS)

_CONFIG, _HARDWARE = TypeAdapter(VmConfig), TypeAdapter(HardwareRecord)
_ORDER, _STATUS, _PROCESS = TypeAdapter(MoveOrder), TypeAdapter(MoveStatus), TypeAdapter(ProcessRef)
_CONVERSION, _CONVERTED = TypeAdapter(ConversionOrder), TypeAdapter(ConversionStatus)
_IMAGES, _PLACED = TypeAdapter(tuple[NewImage, ...]), TypeAdapter(tuple[Place, ...])


@dataclass(frozen=True)
class VmRow:
    """A VM of this host. ``wanted``: it was started and not stopped, so a missing process means it crashed."""

    config: VmConfig
    hardware: HardwareRecord | None = None
    process: ProcessRef | None = None
    wanted: bool = False


@dataclass(frozen=True)
class MoveRow:
    """One attempt this host takes part in. ``process``: the target's QEMU, until the VM is this host's."""

    order: MoveOrder
    status: MoveStatus
    directory: Path
    process: ProcessRef | None = None


@dataclass(frozen=True)
class ConversionRow:
    """One conversion this host was ordered to make. ``places``: where its new images are made; ``images``: those, from
    SWAPPING on."""

    order: ConversionOrder
    status: ConversionStatus
    images: tuple[NewImage, ...] = ()
    places: tuple[Place, ...] = ()


class Journal:
    """Opens or makes the journal at ``path``; raises SealiftError when a newer agent wrote it."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        path.chmod(0o600)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise SealiftError(
                f"the agent's journal has version {version}, this agent knows {_VERSION}", todo="upgrade the agent"
            )
        if missing := _STEPS[version:]:
            self._db.executescript(f"BEGIN; {''.join(missing)} PRAGMA user_version={_VERSION}; COMMIT;")

    def close(self) -> None:
        self._db.close()

    def _do(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise SealiftError(
                f"the agent's journal cannot be read or written: {error}", todo="look whether the disk is full"
            ) from error

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What is written inside takes effect whole or not at all."""
        self._do("BEGIN IMMEDIATE")
        try:
            yield
            self._do("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._do("ROLLBACK")
            raise

    # VMs

    def vms(self) -> dict[UUID, VmRow]:
        """Every VM of this host."""
        rows = self._do("SELECT uuid, config, hardware, process, wanted FROM vm ORDER BY name")
        return {
            UUID(uuid): VmRow(
                _CONFIG.validate_json(config),
                _HARDWARE.validate_json(hardware) if hardware else None,
                _PROCESS.validate_json(process) if process else None,
                bool(wanted),
            )
            for uuid, config, hardware, process, wanted in rows
        }

    def put_vm(self, row: VmRow) -> None:
        """Insert or replace a VM."""
        self._do(
            "INSERT OR REPLACE INTO vm (uuid, name, config, hardware, process, wanted) VALUES (?, ?, ?, ?, ?, ?)",
            (
                str(row.config.uuid),
                row.config.name,
                _CONFIG.dump_json(row.config),
                _HARDWARE.dump_json(row.hardware) if row.hardware else None,
                _PROCESS.dump_json(row.process) if row.process else None,
                row.wanted,
            ),
        )

    def drop_vm(self, vm: UUID) -> None:
        """Forget a VM; its fence stays."""
        self._do("DELETE FROM vm WHERE uuid = ?", (str(vm),))

    # fences

    def check_fence(self, vm: UUID, fence: int) -> None:
        """Record ``fence`` as seen for ``vm``; raises StaleFence when a higher one was seen before."""
        row = self._do("SELECT fence FROM fence WHERE vm = ?", (str(vm),)).fetchone()
        if row and fence < row[0]:
            raise StaleFence(f"an order for VM {vm} carries fence {fence}; this host has seen {row[0]}")
        self._do("INSERT OR REPLACE INTO fence (vm, fence) VALUES (?, ?)", (str(vm), fence))

    # configuration files of encrypted VMs

    def note_file(self, vm: UUID, generation: int, sha256: str) -> None:
        """Record that this configuration file was written."""
        self._do(
            "INSERT OR REPLACE INTO vm_file (vm, generation, sha256) VALUES (?, ?, ?)", (str(vm), generation, sha256)
        )

    def file_generation(self, vm: UUID) -> int:
        """The highest generation written for the VM; 0 when there was none."""
        row = self._do("SELECT generation FROM vm_file WHERE vm = ?", (str(vm),)).fetchone()
        return int(row[0]) if row else 0

    def file_sha256(self, vm: UUID) -> str:
        """The SHA-256 of the file written last, in hex digits; empty when there was none."""
        row = self._do("SELECT sha256 FROM vm_file WHERE vm = ?", (str(vm),)).fetchone()
        return str(row[0]) if row else ""

    # conversions

    def put_conversion(self, row: ConversionRow) -> None:
        """Insert or replace a conversion."""
        self._do(
            'INSERT OR REPLACE INTO conversion (id, "order", status, images, places) VALUES (?, ?, ?, ?, ?)',
            (
                str(row.order.id),
                _CONVERSION.dump_json(row.order),
                _CONVERTED.dump_json(row.status),
                _IMAGES.dump_json(row.images),
                _PLACED.dump_json(row.places),
            ),
        )

    def finish_conversion(self, row: ConversionRow, vm: VmRow) -> None:
        """Record that a conversion is done and what the VM is now, both or neither."""
        with self._together():
            self.put_vm(vm)
            self.put_conversion(row)

    def conversions(self) -> list[ConversionRow]:
        """Every conversion not yet forgotten."""
        rows = self._do('SELECT "order", status, images, places FROM conversion').fetchall()
        return [
            ConversionRow(
                _CONVERSION.validate_json(order),
                _CONVERTED.validate_json(status),
                _IMAGES.validate_json(images),
                _PLACED.validate_json(places),
            )
            for order, status, images, places in rows
        ]

    def drop_conversion(self, conversion: UUID) -> None:
        """Forget a conversion; an order for it is refused from now on."""
        self.refuse_attempt(conversion)
        self._do("DELETE FROM conversion WHERE id = ?", (str(conversion),))

    # moves

    def put_move(self, row: MoveRow) -> None:
        """Insert or replace an attempt of this host's role."""
        status = row.status
        self._do(
            'INSERT OR REPLACE INTO move (attempt, role, vm, state, "order", status, directory, process)'
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                str(status.attempt),
                status.role.value,
                str(row.order.vm),
                status.state.value,
                _ORDER.dump_json(row.order),
                _STATUS.dump_json(status),
                str(row.directory),
                _PROCESS.dump_json(row.process) if row.process else None,
            ),
        )

    def moves(self) -> list[MoveRow]:
        """Every attempt not yet forgotten."""
        rows = self._do('SELECT "order", status, directory, process FROM move').fetchall()
        return [
            MoveRow(
                _ORDER.validate_json(order),
                _STATUS.validate_json(status),
                Path(directory),
                _PROCESS.validate_json(process) if process else None,
            )
            for order, status, directory, process in rows
        ]

    def move(self, attempt: UUID) -> MoveRow | None:
        """The attempt, or None."""
        return next((row for row in self.moves() if row.status.attempt == attempt), None)

    def drop_move(self, attempt: UUID) -> None:
        """Forget an attempt; an order for it is refused from now on."""
        self.refuse_attempt(attempt)
        self._do("DELETE FROM move WHERE attempt = ?", (str(attempt),))

    def refuse_attempt(self, attempt: UUID) -> None:
        """From now on an order for this attempt (or conversion) is refused: it was ended before it came, or is over."""
        self._do("INSERT OR IGNORE INTO refused_attempt (attempt) VALUES (?)", (str(attempt),))

    def attempt_refused(self, attempt: UUID) -> bool:
        """Whether an order for this attempt comes too late."""
        found = self._do("SELECT 1 FROM refused_attempt WHERE attempt = ?", (str(attempt),)).fetchone()
        return found is not None


def unfinished(row: MoveRow) -> bool:
    """Whether the attempt still needs this agent; what could not be settled before is looked at again."""
    return row.status.state not in MOVE_FINAL


def aborted_unseen(attempt: UUID, role: Role) -> MoveStatus:
    """The status of an attempt that was aborted before its order came."""
    return replace(MoveStatus(attempt, role, MoveState.FAILED), error="aborted before the order came")
