"""asyncio and asyncpg: the program starts a server of its own."""

import asyncio

import asyncpg

from pgtemp import aio


async def main() -> None:
    async with aio.PgTempDB(dbname="app") as db:
        connection = await asyncpg.connect(db.uri)
        await connection.execute("CREATE TABLE note (text text)")
        await connection.execute("INSERT INTO note VALUES ('hello')")
        print(await connection.fetchval("SELECT text FROM note"))
        await connection.close()


if __name__ == "__main__":
    asyncio.run(main())
