"""The controller's database: SQLite through SQLAlchemy's asyncio engine, its schema kept by Alembic.

Every transaction begins with BEGIN IMMEDIATE. With the driver's default (a deferred transaction) two tasks can both
read a row and then both write it, and one of the writes is lost. So whoever has a transaction has the only lock, and
must not take it to the grave: see ``_on_invalidate``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

log = structlog.get_logger("sealift.store")

BUSY_TIMEOUT_MS = 10_000


class Store:
    """The database at ``path``. Made by ``open_store``; ``close`` it in the end."""

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600, exist_ok=True)
        self._engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
        event.listen(self._engine.sync_engine, "connect", _on_connect)
        event.listen(self._engine.sync_engine, "begin", _on_begin)
        event.listen(self._engine.sync_engine, "invalidate", _on_invalidate)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """A session whose changes are committed when the block ends, and rolled back when it raises.

        It holds the database's only write lock, so nothing slow (no request to a host) belongs inside. Rows stay
        readable afterwards.
        """
        async with self._sessions() as session, session.begin():
            yield session

    async def upgrade(self) -> None:
        """Bring the schema to the newest revision."""
        async with self._engine.begin() as connection:
            await connection.run_sync(_upgrade)

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()


async def open_store(path: Path) -> Store:
    """The database at ``path`` with its schema up to date; made, readable by us only, if it is not there."""
    store = Store(path)
    await store.upgrade()
    return store


def alembic_config(connection: Connection) -> Config:
    """Alembic's configuration for the revisions in the package, over ``connection``."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def _upgrade(connection: Connection) -> None:
    command.upgrade(alembic_config(connection), "head")


def _on_connect(dbapi: DBAPIConnection, _record: object) -> None:
    dbapi.isolation_level = None  # the driver begins nothing by itself; _on_begin does
    cursor = dbapi.cursor()
    for pragma in (
        "journal_mode=WAL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "synchronous=FULL",  # what was recorded before an effect must survive a power cut
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _on_begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _on_invalidate(dbapi: DBAPIConnection, _record: object, _error: object) -> None:
    """Give up the lock of a connection that is about to be thrown away, as after a task was cancelled in a statement.

    SQLite closes a connection, and with it a transaction, when its last statement goes. A cancelled one may wait for
    the garbage collector, and nobody could use the database until then. The roll-back is queued behind it.
    """
    try:
        dbapi.rollback()
    except Exception as error:
        log.warning("a transaction could not be rolled back", error=str(error))
