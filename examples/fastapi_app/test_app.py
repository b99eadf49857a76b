"""Every test posts note 1, which works because each has its own database."""

from httpx import AsyncClient

from pgtemp import Database


async def test_a_note(client: AsyncClient) -> None:
    said = await client.post("/notes", json={"id": 1, "text": "milk"})
    assert said.status_code == 201
    said = await client.get("/notes")
    assert [note["text"] for note in said.json()] == ["welcome", "milk"]


async def test_the_same_note_twice(client: AsyncClient) -> None:
    said = await client.post("/notes", json={"id": 1, "text": "bread"})
    assert said.status_code == 201
    said = await client.post("/notes", json={"id": 1, "text": "again"})
    assert said.status_code == 409


async def test_what_the_database_holds(client: AsyncClient, pgtemp: Database) -> None:
    """A test can read the database that the application uses."""
    await client.post("/notes", json={"id": 1, "text": "eggs"})
    connection = await pgtemp.aconnect()
    found = await connection.execute("SELECT text FROM note WHERE id = 1")
    assert await found.fetchone() == ("eggs",)
