"""The asyncio door: the same server, and nothing left behind when cancelled."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from conftest import leftovers
from pgtemp import aio
from pgtemp.aio import whole
from support import eventually, homes


def test_a_server_for_asyncio() -> None:
    """Any driver by its URL, psycopg through connect(), and gone afterwards."""

    async def use() -> Path:
        async with aio.PgTempDB(dbname="app") as db:
            driver = await asyncpg.connect(db.uri)
            assert await driver.fetchval("SELECT current_database()") == "app"
            await driver.close()
            async with await db.connect() as connection:
                cursor = await connection.execute("SELECT 1")
                assert await cursor.fetchone() == (1,)
            return db.data_dir

    assert leftovers(asyncio.run(use())) == []


@pytest.mark.parametrize("turns", [0, 1, 5, 20, 80])
def test_a_start_that_is_cancelled_leaves_nothing(turns: int) -> None:
    """At whatever moment of a start the task is cancelled, no server stays."""
    before = homes()

    async def cancel_it() -> None:
        db = aio.PgTempDB()
        task = asyncio.create_task(db.start())
        for _ in range(turns):
            await asyncio.to_thread(lambda: None)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        else:
            await db.stop()

    asyncio.run(cancel_it())
    assert eventually(lambda: homes() <= before)


def test_whole_undoes_what_was_done_when_cancelled() -> None:
    """The work is finished, undone, and only then the task is cancelled."""
    done: list[str] = []

    async def run() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def work() -> None:
            loop.call_soon_threadsafe(begun.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
            done.append("work")

        task = asyncio.create_task(whole(work, undo=lambda: done.append("undo")))
        await begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # impatience changes nothing
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert done == ["work", "undo"]


def test_dump_and_load(tmp_path: Path) -> None:
    async def use() -> None:
        async with aio.PgTempDB.from_uri("postgresql:///one") as db:
            async with await db.connect() as connection:
                await connection.execute("CREATE TABLE t AS SELECT 5 AS n")
            await db.dump(tmp_path / "t.sql")
        async with aio.PgTempDB() as other:
            await other.load(tmp_path / "t.sql")
            async with await other.connect() as connection:
                assert await (await connection.execute("SELECT n FROM t")).fetchone() == (5,)

    asyncio.run(use())
