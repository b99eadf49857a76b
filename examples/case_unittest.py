"""unittest: a server for the class."""

import unittest

from pgtemp import PgTempDB


class AccountTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.db = cls.enterClassContext(PgTempDB())

    def test_addition(self) -> None:
        with self.db.connect() as connection:
            self.assertEqual(connection.execute("SELECT 40 + 2").fetchone(), (42,))


if __name__ == "__main__":
    unittest.main()
