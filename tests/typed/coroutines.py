"""A program that uses the handles for asyncio."""

from pathlib import Path
from typing import Any, assert_type

import psycopg

import pgtemp
from pgtemp import Recipe, Snapshot, aio


async def migrate(uri: str) -> None:
    async with await psycopg.AsyncConnection.connect(uri) as connection:
        await connection.execute("CREATE TABLE account (id int PRIMARY KEY, balance numeric)")


async def one_server() -> None:
    async with aio.PgTempDB(dbname="app", config={"work_mem": "64MB"}) as db:
        assert_type(db, aio.PgTempDB)
        assert_type(db.uri, str)
        assert_type(db.sync, pgtemp.PgTempDB)
        async with await db.connect() as connection:
            assert_type(connection, psycopg.AsyncConnection[Any])
        await db.dump(Path("out.sql"))
    assert_type(await aio.PgTempDB.from_uri("postgresql://localhost/app").start(), aio.PgTempDB)


async def many_databases() -> None:
    async with pgtemp.aio.Cluster(version="16") as cluster:
        assert_type(cluster, aio.Cluster)
        app = await cluster.template("app", build=migrate, watch=[__file__])
        assert_type(app, aio.Template)
        more = await app.template("more", Recipe("more.sql"))
        async with await more.database() as db:
            assert_type(db, aio.Database)
            assert_type(db.info, pgtemp.ConnectionInfo)
            before = await db.snapshot("before")
            assert_type(before, Snapshot)
            await db.restore(before)
            async with await db.fork() as fork, await fork.connect() as connection:
                assert_type(connection, psycopg.AsyncConnection[Any])
        assert_type(await cluster.database(), aio.Database)
