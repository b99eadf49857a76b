"""Every test commits hero 1; that it gets that number shows that sequences are the test's too."""

import pytest
from models import Hero, names
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session


def test_a_hero(session: Session) -> None:
    hero = Hero(name="Deadpond")
    session.add(hero)
    session.commit()
    assert hero.id == 1


def test_names_are_unique(session: Session) -> None:
    hero = Hero(name="Deadpond")
    session.add(hero)
    session.commit()
    assert hero.id == 1
    session.add(Hero(name="Deadpond"))
    with pytest.raises(IntegrityError):
        session.commit()
    session.rollback()
    assert names(session) == ["Deadpond"]
