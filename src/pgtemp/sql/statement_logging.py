"""Who is told of statements that are planned, and not executed, so that none are ahead of time."""

from __future__ import annotations

from pgtemp.sql.admin_connections import Connection

# In names of settings by which somebody is told of statements that are only planned, too.
WATCHING = (
    "preload_libraries", "log_statement", "log_duration", "log_min_duration", "log_min_messages",
    "log_transaction_sample_rate", "log_parser_stats", "log_planner_stats", "debug_print_",
)  # fmt: skip


def is_watched(connection: Connection) -> bool:
    """Whether a server tells somebody of each statement, or may for some roles; see WATCHING."""
    patterns = [f"%{name}%" for name in WATCHING]
    found = connection.execute(
        "SELECT 1 FROM pg_settings WHERE name LIKE ANY (%(patterns)s)"
        " AND setting IS DISTINCT FROM coalesce(boot_val, '')"
        " UNION ALL SELECT 1 FROM pg_db_role_setting"
        " WHERE setconfig::text LIKE ANY (%(patterns)s)",
        {"patterns": patterns},
    )
    return found.fetchone() is not None
