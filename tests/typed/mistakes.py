"""Mistakes: a type checker reports each line that ignores its error."""

import pgtemp
from pgtemp import Cluster, Database, PgTempDB, Recipe, ServerOptions, aio


def options(db: PgTempDB) -> None:
    PgTempDB(prot=5432)  # type: ignore[call-arg]
    PgTempDB(5432)  # type: ignore[call-arg]
    PgTempDB(port="5432")  # type: ignore[arg-type]
    Cluster(config=["work_mem=1MB"])  # type: ignore[arg-type]
    ServerOptions(ttl="1 min")  # type: ignore[arg-type]
    db.uri = "postgresql://localhost"  # type: ignore[misc]
    db.password.upper()  # type: ignore[union-attr]
    pgtemp.PgTempDb()  # type: ignore[attr-defined]


def builds(cluster: Cluster) -> None:
    cluster.template("app")  # type: ignore[call-arg]
    cluster.template("app", 5)  # type: ignore[arg-type]
    cluster.template("app", lambda: None)  # type: ignore[arg-type]
    cluster.template("app", "schema.sql", "key")  # type: ignore[call-arg]
    Recipe("schema.sql", watch=5)  # type: ignore[arg-type]


async def coroutines(db: aio.Database, blocking: Database) -> None:
    db.connect().execute("SELECT 1")  # type: ignore[attr-defined]
    with db:  # type: ignore[attr-defined]
        pass
    async with blocking:  # type: ignore[attr-defined]
        pass
    async with aio.PgTempDB(prot=5432):  # type: ignore[call-arg]
        pass
    await blocking.fork()  # type: ignore[misc]
