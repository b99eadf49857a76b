"""Every test commits a hero and gets id 1, so each test also has its own sequences."""

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
