"""The application: notes, with a pool that the application opens when it starts."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel


class Note(BaseModel):
    id: int
    text: str


def create_app(database_url: str) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with asyncpg.create_pool(database_url, min_size=1) as pool:
            app.state.pool = pool
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/notes", status_code=201)
    async def add(request: Request, note: Note) -> Note:
        try:
            await request.app.state.pool.execute(
                "INSERT INTO note VALUES ($1, $2)", note.id, note.text
            )
        except asyncpg.UniqueViolationError:
            raise HTTPException(409, f"there is a note {note.id}") from None
        return note

    @app.get("/notes")
    async def every(request: Request) -> list[Note]:
        rows = await request.app.state.pool.fetch("SELECT id, text FROM note ORDER BY id")
        return [Note(**row) for row in rows]

    return app
