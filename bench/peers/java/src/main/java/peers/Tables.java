package peers;

import java.sql.Connection;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;

/** The fifty tables, and the queries of the measurements. */
final class Tables {
    private static final int COUNT = 50;

    private Tables() {}

    static void make(Connection connection) throws SQLException {
        try (Statement statement = connection.createStatement()) {
            for (int i = 0; i < COUNT; i++) {
                statement.addBatch("CREATE TABLE t%d (a int, b int, c int, d int)".formatted(i));
                for (String column : new String[] {"a", "b", "c", "d"}) {
                    statement.addBatch("CREATE INDEX ON t%d (%s)".formatted(i, column));
                }
            }
            statement.executeBatch();
        }
    }

    static boolean areThere(Connection connection) throws SQLException {
        return number(connection, "SELECT count(*) FROM pg_tables WHERE tablename = 't0'") == 1;
    }

    /** The number in the first row. */
    static long number(Connection connection, String query) throws SQLException {
        try (Statement statement = connection.createStatement();
                ResultSet rows = statement.executeQuery(query)) {
            rows.next();
            return rows.getLong(1);
        }
    }

    /** Checks that a query returns only this number. */
    static void expect(Connection connection, String query, long number) throws SQLException {
        long found = number(connection, query);
        if (found != number) {
            throw new IllegalStateException(query + " gave " + found);
        }
    }

    static void insert(Connection connection, int a) throws SQLException {
        try (PreparedStatement statement = connection.prepareStatement("INSERT INTO t0 VALUES (?, 1, 1, 1)")) {
            statement.setInt(1, a);
            statement.executeUpdate();
        }
    }
}
