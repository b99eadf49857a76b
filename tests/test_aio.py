"""The asyncio classes: the same servers, and nothing is left after a cancellation."""

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
    """Any driver can use its URL, psycopg also connect(); the server is removed afterwards."""

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
    """No server stays, at whatever moment of a start the task is cancelled."""
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


def test_whole_undoes_its_work_when_cancelled() -> None:
    """The work is finished and undone, and only then the task is cancelled."""
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
        task.cancel()  # a second cancellation changes nothing
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


def test_a_cluster_for_asyncio(tmp_path: Path) -> None:
    """Databases, a template built by a coroutine, a snapshot, a fork, a dump."""
    built: list[str] = []

    async def migrate(uri: str) -> None:
        built.append(uri)
        driver = await asyncpg.connect(uri)
        await driver.execute("CREATE TABLE t (n int)")
        await driver.close()

    async def count(db: aio.Database) -> int:
        async with await db.connect() as connection:
            row = await (await connection.execute("SELECT count(*) FROM t")).fetchone()
            assert row is not None
            return int(row[0])

    async def use() -> Path:
        async with aio.Cluster() as cluster:
            async with await cluster.database() as empty:
                assert "empty" in empty.dbname
            app, again = await asyncio.gather(
                cluster.template("app", build=migrate), cluster.template("app", build=migrate)
            )
            assert len(built) == 1 and app.name == again.name
            async with await app.database() as db:
                snapshot = await db.snapshot("start")
                async with await db.connect() as connection:
                    await connection.execute("INSERT INTO t VALUES (1)")
                async with await db.fork() as fork:
                    assert await count(fork) == 1
                await db.restore(snapshot)
                assert await count(db) == 0
                await db.dump(tmp_path / "db.sql")
                assert "CREATE TABLE public.t" in (tmp_path / "db.sql").read_text()
            return cluster.sync.server.data_dir

    assert leftovers(asyncio.run(use())) == []


def test_a_template_from_a_second_event_loop() -> None:
    """A cluster outlives an event loop; the same coroutine function is the same build."""

    async def migrate(uri: str) -> None:
        driver = await asyncpg.connect(uri)
        await driver.execute("CREATE TABLE t (n int)")
        await driver.close()

    async def use(cluster: aio.Cluster) -> None:
        app = await cluster.template("app", build=migrate)
        async with await app.database() as db, await db.connect() as connection:
            await connection.execute("SELECT * FROM t")

    cluster = aio.Cluster()
    with cluster.sync:
        asyncio.run(use(cluster))
        asyncio.run(use(cluster))


def test_a_cancelled_claim_returns_its_database() -> None:
    """At whatever moment it is cancelled, no unused clone stays."""

    async def use() -> None:
        async with aio.Cluster() as cluster:
            for _ in range(30):
                task = asyncio.create_task(cluster.database())
                await asyncio.to_thread(lambda: None)
                task.cancel()
                try:
                    await (await task).close()
                except asyncio.CancelledError:
                    pass
            with cluster.sync.database() as db, db.connect() as connection:

                def left() -> int:
                    row = connection.execute(
                        "SELECT count(*) FROM pg_database WHERE datname LIKE 'empty%'"
                    ).fetchone()
                    connection.rollback()
                    assert row is not None
                    return int(row[0])

                # the one in use, and those in the pool
                assert eventually(lambda: left() <= 1 + 2 + 1)

    asyncio.run(use())
