"""The controller's tables. The schema itself is made by the Alembic revisions beside this file; a test compares them.

Times are seconds since the epoch (float), since SQLite has no type for them. Nothing secret is in any column: tokens
are stored as the SHA-256 of 128 random bits, and one-time keys never come here.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, LargeBinary, MetaData, String, Text, Uuid, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sealift.domain.lifecycle import State
from sealift.domain.policy import MigrateEncryption


class Base(DeclarativeBase):
    """Root of the tables; constraints get stable names, so that later revisions can address them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class TokenRow(Base):
    """An access token: of a person (``admin``, no end) or for one join (an hour)."""

    __tablename__ = "tokens"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(63), default="")
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    replaces: Mapped[str | None] = mapped_column(String(63))
    used_at: Mapped[float | None]
    used_key: Mapped[bytes | None] = mapped_column(LargeBinary)  # the public key (DER) that used it
    host: Mapped[UUID | None] = mapped_column(Uuid)  # the host that joined with it
    certificate: Mapped[str | None] = mapped_column(Text)


class HostRow(Base):
    """A host that joined. ``public_key`` (DER) is pinned: nobody else at its address gets an order."""

    __tablename__ = "hosts"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    address: Mapped[str] = mapped_column(String(300))
    migration_address: Mapped[str] = mapped_column(String(300))
    public_key: Mapped[bytes] = mapped_column(LargeBinary)
    joined_at: Mapped[float]
    was_capable: Mapped[bool] = mapped_column(default=False)
    lost_at: Mapped[float | None]  # since when it says it cannot, although it could; None after `host accept`


class VmRow(Base):
    """A VM: where it is placed, its setting, and the fence that orders about it carry.

    Of an encrypted one also what finds its key, and ``config_file``: the last configuration file that we wrote and its
    host took, byte for byte. Its DEKs are in there, wrapped, and nowhere else.
    """

    __tablename__ = "vms"

    uuid: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    host: Mapped[UUID] = mapped_column(Uuid, ForeignKey("hosts.id"))
    migrate_encryption: Mapped[str] = mapped_column(String(16), default=MigrateEncryption.OPPORTUNISTIC.value)
    encrypted: Mapped[bool] = mapped_column(default=False)
    fence: Mapped[int] = mapped_column(default=1)
    config: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[float]
    provider: Mapped[str | None] = mapped_column(String(63), index=True)
    key_id: Mapped[str | None] = mapped_column(String(128))
    generation: Mapped[int] = mapped_column(default=0)  # never falls, not even when the VM is decrypted
    config_file: Mapped[bytes | None] = mapped_column(LargeBinary)
    setting_before: Mapped[str | None] = mapped_column(String(16))  # migrate_encryption before it was encrypted
    lock_reason: Mapped[str] = mapped_column(Text, default="")  # empty: its keys can be had, or its host has them


class KeyProviderRow(Base):
    """A key provider. What it keeps secret lies in the state directory, never here. Names are for ever."""

    __tablename__ = "key_providers"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    members: Mapped[list[str]] = mapped_column(JSON)
    is_default: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[float]
    exported_at: Mapped[float | None]  # when an export was read back; kmip: None


class FreshKeyRow(Base):
    """A key that is about to be made, or was made and is in no record yet; its provider finds it by its label."""

    __tablename__ = "fresh_keys"

    label: Mapped[str] = mapped_column(String(128), primary_key=True)
    provider: Mapped[str] = mapped_column(String(63))
    vm_name: Mapped[str] = mapped_column(String(63))


class ConversionRow(Base):
    """An encryption, decryption or rekey of a VM: what it becomes, written before its host is told.

    ``after_config`` and ``after_file`` become the VM's when the host has done it, and are dropped when it has not.
    """

    __tablename__ = "conversions"
    __table_args__ = (
        Index(
            "uq_conversions_one_per_vm",
            "vm",
            unique=True,
            sqlite_where=text("finished_at IS NULL"),
            postgresql_where=text("finished_at IS NULL"),
        ),
    )

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    vm: Mapped[UUID] = mapped_column(Uuid)
    vm_name: Mapped[str] = mapped_column(String(63))
    host: Mapped[UUID] = mapped_column(Uuid)
    host_name: Mapped[str] = mapped_column(String(63))
    kind: Mapped[str] = mapped_column(String(16))
    deep: Mapped[bool]
    state: Mapped[str] = mapped_column(String(16))
    verify: Mapped[str] = mapped_column(String(8))
    done_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    total_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    provider: Mapped[str] = mapped_column(String(63), default="")
    key_id: Mapped[str] = mapped_column(String(128), default="")
    old_provider: Mapped[str] = mapped_column(String(63), default="")
    old_key_id: Mapped[str] = mapped_column(String(128), default="")
    after_config: Mapped[dict[str, Any]] = mapped_column(JSON)
    after_file: Mapped[bytes] = mapped_column(LargeBinary)
    fence: Mapped[int]
    with_vm: Mapped[bool] = mapped_column(default=False)  # the VM was made for it, and goes with it if it fails
    findings: Mapped[list[dict[str, str]]] = mapped_column(JSON)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    error_slug: Mapped[str] = mapped_column(String(64), default="")
    error: Mapped[str] = mapped_column(Text, default="")
    todo: Mapped[str] = mapped_column(Text, default="")
    requested_by: Mapped[str] = mapped_column(String(63))
    created_at: Mapped[float] = mapped_column(index=True)
    finished_at: Mapped[float | None]
    key_unused: Mapped[bool] = mapped_column(default=False)  # its new key is under nothing, and to be destroyed still
    tidied: Mapped[bool] = mapped_column(default=True)  # false while its host, or others, may hold leftovers of it


class SettingRow(Base):
    """A setting of the controller that was changed; what is not here has its default (``domain.settings``)."""

    __tablename__ = "settings"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    value: Mapped[str] = mapped_column(String(200))


class MigrationRow(Base):
    """A migration's record. Hosts are named and numbered as they were then; they may be gone since."""

    __tablename__ = "migrations"
    __table_args__ = (
        # At most one unfinished migration of a VM, whatever races.
        Index(
            "uq_migrations_unfinished_vm",
            "vm",
            unique=True,
            sqlite_where=text("finished_at IS NULL"),
            postgresql_where=text("finished_at IS NULL"),
        ),
    )

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    vm: Mapped[UUID] = mapped_column(Uuid)
    vm_name: Mapped[str] = mapped_column(String(63))
    source: Mapped[UUID] = mapped_column(Uuid)
    source_name: Mapped[str] = mapped_column(String(63))
    target: Mapped[UUID] = mapped_column(Uuid)
    target_name: Mapped[str] = mapped_column(String(63))
    state: Mapped[str] = mapped_column(String(16), default=State.REQUESTED.value)
    asked_policy: Mapped[str] = mapped_column(String(16))
    protection: Mapped[str | None] = mapped_column(String(8))
    reason: Mapped[str] = mapped_column(Text, default="")
    cipher: Mapped[str | None] = mapped_column(String(32))
    channels: Mapped[int]
    bandwidth: Mapped[int] = mapped_column(BigInteger)
    max_downtime_ms: Mapped[int]
    give_up_ms: Mapped[int]
    switchover_timeout_ms: Mapped[int]
    attempt: Mapped[UUID | None] = mapped_column(Uuid)
    fence: Mapped[int | None]
    sealed_out: Mapped[int] = mapped_column(BigInteger, default=0)
    sealed_in: Mapped[int] = mapped_column(BigInteger, default=0)
    target_sealed_out: Mapped[int] = mapped_column(BigInteger, default=0)
    target_sealed_in: Mapped[int] = mapped_column(BigInteger, default=0)
    phases: Mapped[list[list[Any]]] = mapped_column(JSON)  # [state, at] in order
    findings: Mapped[list[dict[str, str]]] = mapped_column(JSON)
    downtime_ms: Mapped[float | None]
    outages: Mapped[int] = mapped_column(default=0)
    longest_outage_ms: Mapped[int] = mapped_column(default=0)
    reconnects: Mapped[int] = mapped_column(default=0)
    outage_events: Mapped[int] = mapped_column(default=0)  # how many events of outages were told of it
    timeline: Mapped[list[list[Any]]] = mapped_column(JSON)  # [where, step, at], each on its host's clock
    requested_by: Mapped[str] = mapped_column(String(63))
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    error_slug: Mapped[str] = mapped_column(String(64), default="")
    error: Mapped[str] = mapped_column(Text, default="")
    todo: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[float] = mapped_column(index=True)
    finished_at: Mapped[float | None]
    tidied: Mapped[bool] = mapped_column(default=True)  # false while a host may still hold leftovers of the attempt


class EventRow(Base):
    """One thing that happened; rows are only ever added, and ``seq`` is never used twice."""

    __tablename__ = "events"
    __table_args__ = ({"sqlite_autoincrement": True},)

    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    type: Mapped[str] = mapped_column(String(64))
    text: Mapped[str] = mapped_column(Text)
    host: Mapped[str | None] = mapped_column(String(63))
    vm: Mapped[str | None] = mapped_column(String(63))
    migration: Mapped[UUID | None] = mapped_column(Uuid)
    state: Mapped[str | None] = mapped_column(String(16))
    slug: Mapped[str | None] = mapped_column(String(64))  # of the error that it tells of
