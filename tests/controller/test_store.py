"""The database: no lost updates, the schema as the models say, down and up again, and what must be unique is."""

from __future__ import annotations

import asyncio
import gc
import stat
import threading
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, event, inspect, text
from sqlalchemy.exc import IntegrityError

from sealift.controller.events import EventLog, Happening
from sealift.controller.models import Base, HostRow, VmRow
from sealift.controller.store import Store, alembic_config, open_store


def test_no_update_is_lost(tmp_path: Path) -> None:
    """With the driver's own transactions about half of these are."""

    async def main() -> None:
        store = await open_store(tmp_path / "db")
        host, vm = uuid4(), uuid4()
        async with store.transaction() as session:
            session.add(
                HostRow(id=host, name="a", address="a:1", migration_address="a:2", public_key=b"", joined_at=0.0)
            )
            await session.flush()
            session.add(VmRow(uuid=vm, name="vm1", host=host, fence=1, config={}, created_at=0.0))

        async def bump() -> None:
            for _ in range(50):
                async with store.transaction() as session:
                    row = await session.get_one(VmRow, vm)
                    await asyncio.sleep(0)
                    row.fence += 1

        await asyncio.gather(bump(), bump(), bump())
        async with store.transaction() as session:
            assert (await session.get_one(VmRow, vm)).fence == 151
        await store.close()

    asyncio.run(main())


@pytest.mark.parametrize("statement", ["select pause() union all select 2", "update events set text = pause()"])
def test_who_is_cancelled_in_a_statement_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    monkeypatch.setattr("sealift.controller.store.BUSY_TIMEOUT_MS", 500)
    begun, go_on = threading.Event(), threading.Event()

    def pause() -> int:
        begun.set()
        return go_on.wait(60)

    def on_connect(dbapi: Any, _record: object) -> None:
        dbapi.run_async(lambda connection: connection.create_function("pause", 0, pause))

    async def main() -> None:
        store = await open_store(tmp_path / "db")
        log = EventLog(store)
        async with log.transaction() as session:
            log.add(session, Happening("test", "kept"))
        await store._engine.dispose()
        event.listen(store._engine.sync_engine, "connect", on_connect)

        async def ask() -> None:
            async with store.transaction() as session:
                await session.execute(text(statement))

        asking = asyncio.create_task(ask())
        await asyncio.to_thread(begun.wait, 60)
        asking.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await asking
        async with log.transaction() as session:
            log.add(session, Happening("test", "next"))
        assert [row.text for row in await log.after(0)] == ["kept", "next"]
        await store.close()

    gc.disable()  # which may free what the cancelled statement holds, or may not
    try:
        asyncio.run(main())
    finally:
        gc.enable()


def test_the_revisions_make_what_the_models_say(tmp_path: Path) -> None:
    def compare(connection: Connection) -> None:
        context = MigrationContext.configure(connection, opts={"render_as_batch": True})
        assert compare_metadata(context, Base.metadata) == []
        command.check(alembic_config(connection))
        command.downgrade(alembic_config(connection), "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
        command.upgrade(alembic_config(connection), "head")
        inspector = inspect(connection)
        assert set(Base.metadata.tables) < set(inspector.get_table_names())
        indexes = {index["name"]: index for index in inspector.get_indexes("migrations")}
        assert indexes["uq_migrations_unfinished_vm"]["unique"]

    async def main() -> None:
        store = await open_store(tmp_path / "db")
        async with store._engine.begin() as connection:
            await connection.run_sync(compare)
        await store.close()

    asyncio.run(main())


def test_a_record_of_before_gets_the_patience_that_held_then(tmp_path: Path) -> None:
    def upgrade(connection: Connection) -> None:
        command.upgrade(alembic_config(connection), "0001")
        columns = inspect(connection).get_columns("migrations")
        values = {
            column["name"]: "[]" if column["name"] in ("phases", "findings") else uuid4().hex
            for column in columns
            if not column["nullable"]
        }
        names = ", ".join(values)
        connection.execute(
            text(f"INSERT INTO migrations ({names}) VALUES ({', '.join(':' + name for name in values)})"), values
        )
        command.upgrade(alembic_config(connection), "head")

    async def main() -> None:
        store = Store(tmp_path / "db")
        async with store._engine.begin() as connection:
            await connection.run_sync(upgrade)
        columns = "give_up_ms, switchover_timeout_ms, outages, reconnects, timeline"
        async with store.transaction() as session:
            row = (await session.execute(text(f"SELECT {columns} FROM migrations"))).one()
        assert tuple(row) == (60_000, 5_000, 0, 0, "[]")
        await store.close()

    asyncio.run(main())


def test_the_file_is_ours_alone_and_survives_power_cuts(tmp_path: Path) -> None:
    async def main() -> None:
        store = await open_store(tmp_path / "db")
        assert stat.S_IMODE((tmp_path / "db").stat().st_mode) == 0o600
        async with store.transaction() as session:
            for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
                assert (await session.execute(text(f"PRAGMA {pragma}"))).scalar() == value
        await store.close()
        await (await open_store(tmp_path / "db")).close()  # an upgrade that has nothing to do

    asyncio.run(main())


def test_a_vm_is_placed_at_a_host_that_is_there(tmp_path: Path) -> None:
    async def add(store: Store) -> None:
        async with store.transaction() as session:
            session.add(VmRow(uuid=uuid4(), name="vm1", host=uuid4(), config={}, created_at=0.0))

    async def main() -> None:
        store = await open_store(tmp_path / "db")
        with pytest.raises(IntegrityError):
            await add(store)
        await store.close()

    asyncio.run(main())


def test_events_come_in_order_and_nobody_misses_one(tmp_path: Path) -> None:
    async def main() -> None:
        store = await open_store(tmp_path / "db")
        log = EventLog(store)

        async def write(writer: int) -> None:
            for number in range(20):
                async with log.transaction() as session:
                    log.add(session, Happening("test", f"{writer}/{number}"))

        async def read() -> list[int]:
            seen: list[int] = []
            async for rows in log.follow(0, idle_s=30):
                seen += [row.seq for row in rows]
                if len(seen) >= 60:
                    return seen
            raise AssertionError("unreachable")

        readers = [asyncio.create_task(read()) for _ in range(3)]
        await asyncio.gather(*(write(writer) for writer in range(3)))
        async with asyncio.timeout(10):
            for seen in await asyncio.gather(*readers):
                assert seen == list(range(1, 61))
        await store.close()

    asyncio.run(main())


def test_what_was_rolled_back_did_not_happen(tmp_path: Path) -> None:
    async def main() -> None:
        store = await open_store(tmp_path / "db")
        log = EventLog(store)

        async def fail() -> None:
            async with log.transaction() as session:
                log.add(session, Happening("test", "no"))
                raise RuntimeError("a defect")

        with pytest.raises(RuntimeError):
            await fail()
        assert await log.after(0) == []
        assert await log.last() == 0
        await store.close()

    asyncio.run(main())
