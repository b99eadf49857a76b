"""Detect settings that report statements which are planned but not executed.

With such settings, pgtemp plans no statements in advance, because they would be reported.
"""

from __future__ import annotations

from pgtemp.sql.connection import Connection

# Patterns for the names of settings that log statements that are only planned, or pass them to a
# library.
WATCHING = (
    "preload_libraries", "log_statement", "log_duration", "log_min_duration", "log_min_messages",
    "log_transaction_sample_rate", "log_parser_stats", "log_planner_stats", "debug_print_",
)  # fmt: skip


def is_watched(connection: Connection) -> bool:
    """Return whether a setting in WATCHING is changed, for the server, a database or a role."""
    patterns = [f"%{name}%" for name in WATCHING]
    found = connection.execute(
        "SELECT 1 FROM pg_settings WHERE name LIKE ANY (%(patterns)s)"
        " AND setting IS DISTINCT FROM coalesce(boot_val, '')"
        " UNION ALL SELECT 1 FROM pg_db_role_setting"
        " WHERE setconfig::text LIKE ANY (%(patterns)s)",
        {"patterns": patterns},
    )
    return found.fetchone() is not None
