package accounts;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;

import java.sql.Connection;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.HashSet;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import javax.sql.DataSource;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.extension.RegisterExtension;

/** Tests the databases that connections and pools get from pgtemp. */
@Timeout(60)
class DatabasesTest {
    private static final String COUNT = "SELECT count(*) FROM account";
    @RegisterExtension final PgTemp pgtemp = new PgTemp();

    @Test
    void eachConnectionHasADatabaseOfItsOwn() throws SQLException {
        Connection first = pgtemp.connection();
        openOne(first);

        Connection next = pgtemp.connection();

        assertEquals(0, number(next, COUNT));
        assertEquals(1, number(first, COUNT));
    }

    @Test
    void theConnectionsOfAPoolShareADatabase() throws SQLException {
        DataSource pool = pgtemp.pool();
        Set<Long> backends = new HashSet<>();
        try (Connection one = pool.getConnection();
                Connection two = pool.getConnection();
                Connection three = pool.getConnection()) {
            openOne(one);
            for (Connection each : new Connection[] {one, two, three}) {
                assertEquals(1, number(each, COUNT));
                backends.add(backend(each));
            }
        }
        assertEquals(3, backends.size());
    }

    @Test
    void twoSessionsDoNotSeeEachOther() throws SQLException {
        try (Connection one = pgtemp.pool().getConnection();
                Connection other = pgtemp.pool().getConnection()) {
            openOne(one);

            assertEquals(0, number(other, COUNT));
        }
    }

    @Test
    void aCancelledStatementLeavesItsConnectionUsable() throws Exception {
        DataSource pool = pgtemp.pool();
        Connection neighbour = pgtemp.connection();
        try (Connection onlooker = pool.getConnection();
                Connection busy = pool.getConnection();
                Statement asleep = busy.createStatement()) {
            long pid = backend(busy);
            long neighbours = backend(neighbour);
            var result = CompletableFuture.supplyAsync(() -> failure(asleep, 60));
            var nextDoor = CompletableFuture.supplyAsync(() -> failure(neighbour, 2));
            waitUntilAsleep(onlooker, pid);
            waitUntilAsleep(onlooker, neighbours);

            asleep.cancel();

            assertEquals("57014", result.get());
            assertEquals("none", nextDoor.get());
            openOne(busy);
            assertEquals(pid, backend(busy));
        }
    }

    @Test
    void aStatementThatTakesTooLongLeavesItsConnectionUsable() throws SQLException {
        try (Connection connection = pgtemp.pool().getConnection();
                Statement asleep = connection.createStatement()) {
            long pid = backend(connection);
            asleep.setQueryTimeout(1);

            assertEquals("57014", failure(asleep, 60));

            openOne(connection);
            assertEquals(pid, backend(connection));
        }
    }

    @Test
    void anErrorHasItsSqlState() throws SQLException {
        Connection connection = pgtemp.connection();
        for (String[] each : new String[][] {
            {"SELECT 1/0", "22012"}, {"SELECT * FROM nothing", "42P01"}, {"SELEC 1", "42601"},
        }) {
            var error = assertThrows(SQLException.class, () -> number(connection, each[0]));
            assertEquals(each[1], error.getSQLState());
        }
    }

    private static void openOne(Connection connection) throws SQLException {
        try (Statement statement = connection.createStatement()) {
            statement.execute("INSERT INTO account (owner, balance) VALUES ('ada', 100)");
        }
    }

    private static long number(Connection connection, String query) throws SQLException {
        try (Statement statement = connection.createStatement();
                ResultSet rows = statement.executeQuery(query)) {
            rows.next();
            return rows.getLong(1);
        }
    }

    private static long backend(Connection connection) throws SQLException {
        return number(connection, "SELECT pg_backend_pid()");
    }

    /** Sleeps in the server and returns the SQLSTATE of the error, or "none". */
    private static String failure(Statement statement, int seconds) {
        try {
            statement.execute("SELECT pg_sleep(" + seconds + ")");
            return "none";
        } catch (SQLException error) {
            return error.getSQLState();
        }
    }

    private static String failure(Connection connection, int seconds) {
        try (Statement statement = connection.createStatement()) {
            return failure(statement, seconds);
        } catch (SQLException error) {
            return error.getSQLState();
        }
    }

    private static void waitUntilAsleep(Connection onlooker, long pid) throws Exception {
        String sleeps = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        while (number(onlooker, sleeps + " AND pid = " + pid) == 0) {
            TimeUnit.MILLISECONDS.sleep(5);
        }
    }
}
