"""Every test puts job 1 into the queue, which works because each has its own database."""

import asyncio

import asyncpg
from queue_of_jobs import put, take


async def test_empty_again(pool: asyncpg.Pool) -> None:
    await put(pool, 1)
    assert await take(pool) == 1
    assert await take(pool) is None


async def test_workers_side_by_side(pool: asyncpg.Pool) -> None:
    for job in (1, 2, 3):
        await put(pool, job)
    taken = await asyncio.gather(*(take(pool) for _ in range(3)))
    assert None not in taken
    assert sorted(job for job in taken if job is not None) == [1, 2, 3]


async def test_two_pools(pool: asyncpg.Pool, pgtemp_uri: str) -> None:
    """A test can open any number of connections to its own database."""
    await put(pool, 1)
    async with asyncpg.create_pool(pgtemp_uri, min_size=1) as other:
        assert await take(other) == 1
    assert await take(pool) is None
