"""testing.postgresql: one server is initialized; each test gets a server that is copied from it.

In every test member 1 joins, which works because each has its own server.
"""

import unittest

import psycopg
import testing.postgresql
from members import SCHEMA, Club


def handler(postgresql: testing.postgresql.Postgresql) -> None:
    with psycopg.connect(postgresql.url()) as connection:
        connection.execute(SCHEMA)


Postgresql = testing.postgresql.PostgresqlFactory(cache_initialized_db=True, on_initialized=handler)


def tearDownModule() -> None:
    Postgresql.clear_cache()


class ClubTest(unittest.TestCase):
    def setUp(self) -> None:
        self.postgresql = Postgresql()
        self.club = Club(self.postgresql.url())

    def tearDown(self) -> None:
        self.postgresql.stop()

    def test_joining(self) -> None:
        self.club.join(1, "Ada")
        self.assertEqual(self.club.names(), ["Ada"])

    def test_in_order(self) -> None:
        self.club.join(2, "Grace")
        self.club.join(1, "Barbara")
        self.assertEqual(self.club.names(), ["Barbara", "Grace"])

    def test_a_number_is_taken(self) -> None:
        self.club.join(1, "Edsger")
        with self.assertRaises(psycopg.errors.UniqueViolation):
            self.club.join(1, "Tony")


if __name__ == "__main__":
    unittest.main()
