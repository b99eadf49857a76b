"""unittest: one template per module, one database per test."""

import unittest
from pathlib import Path

from pgtemp import Cluster, Template

accounts: Template


def setUpModule() -> None:
    global accounts
    cluster = unittest.enterModuleContext(Cluster())
    accounts = cluster.template("accounts", Path(__file__).parent / "schema.sql")


class AccountTest(unittest.TestCase):
    """Every test opens account 1 and commits, which works because each has its own database."""

    def setUp(self) -> None:
        self.db = self.enterContext(accounts.database())

    def test_opening(self) -> None:
        with self.db.connect() as connection:
            connection.execute("INSERT INTO account VALUES (1, 100)")
        with self.db.connect() as connection:
            self.assertEqual(connection.execute("SELECT * FROM account").fetchall(), [(1, 100)])

    def test_opening_another(self) -> None:
        with self.db.connect() as connection:
            connection.execute("INSERT INTO account VALUES (1, 200)")
        with self.db.connect() as connection:
            self.assertEqual(connection.execute("SELECT * FROM account").fetchall(), [(1, 200)])


if __name__ == "__main__":
    unittest.main()
