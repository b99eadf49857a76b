"""The application: a queue from which several workers take jobs."""

import asyncpg


async def create_tables(uri: str) -> None:
    connection = await asyncpg.connect(uri)
    await connection.execute("CREATE TABLE job (id int PRIMARY KEY, done bool DEFAULT false)")
    await connection.close()


async def put(pool: asyncpg.Pool, job: int) -> None:
    await pool.execute("INSERT INTO job (id) VALUES ($1)", job)


async def take(pool: asyncpg.Pool) -> int | None:
    """Return the next job; two workers never get the same one."""
    found: int | None = await pool.fetchval(
        "UPDATE job SET done = true WHERE id = ("
        "  SELECT id FROM job WHERE NOT done ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED"
        ") RETURNING id"
    )
    return found
