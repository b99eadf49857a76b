"""The application: heroes."""

from sqlmodel import Field, Session, SQLModel, select


class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True)


def names(session: Session) -> list[str]:
    return list(session.exec(select(Hero.name).order_by(Hero.name)))
