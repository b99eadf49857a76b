"""pgtemp: one server; each test gets a database that is cloned from a template.

In every test member 1 joins, which works because each has its own database.
"""

import unittest

import psycopg
from members import SCHEMA, Club

from pgtemp import Cluster


def handler(uri: str) -> None:
    with psycopg.connect(uri) as connection:
        connection.execute(SCHEMA)


cluster = Cluster()


def setUpModule() -> None:
    cluster.start()


def tearDownModule() -> None:
    cluster.stop()


class ClubTest(unittest.TestCase):
    def setUp(self) -> None:
        # The first use of the name builds the template; later uses return the same template.
        self.postgresql = cluster.template("club", handler).database()
        self.club = Club(self.postgresql.uri)

    def tearDown(self) -> None:
        self.postgresql.close()

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
