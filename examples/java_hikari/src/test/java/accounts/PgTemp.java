package accounts;

import com.zaxxer.hikari.HikariConfig;
import com.zaxxer.hikari.HikariDataSource;
import java.net.URI;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.SQLException;
import java.util.ArrayList;
import java.util.List;
import java.util.Objects;
import java.util.UUID;
import org.junit.jupiter.api.extension.AfterEachCallback;
import org.junit.jupiter.api.extension.ExtensionContext;

/** The fixture: copy this file. It closes all pools and connections of a test after the test. */
public final class PgTemp implements AfterEachCallback {
    private static final URI DATABASE = URI.create(environment("DATABASE_URL"));
    private final List<AutoCloseable> opened = new ArrayList<>();

    /** Opens a pool on a database of its own: its connections name a unique session. */
    public HikariDataSource pool() {
        HikariConfig config = new HikariConfig();
        config.setJdbcUrl(url("~" + UUID.randomUUID()));
        config.setUsername(user());
        config.setMaximumPoolSize(4);
        return closedLater(new HikariDataSource(config));
    }

    /** Opens one connection, with a database of its own. */
    public Connection connection() throws SQLException {
        return closedLater(DriverManager.getConnection(url(""), user(), null));
    }

    @Override
    public void afterEach(ExtensionContext context) throws Exception {
        for (AutoCloseable one : opened) {
            one.close();
        }
    }

    /** Returns DATABASE_URL in the form that JDBC requires, without the user. */
    private static String url(String session) {
        String path = DATABASE.getPath() + session;
        return "jdbc:postgresql://" + DATABASE.getHost() + ":" + DATABASE.getPort() + path;
    }

    private static String environment(String name) {
        return Objects.requireNonNull(System.getenv(name), name + " leads to pgtemp");
    }

    private static String user() {
        String user = DATABASE.getUserInfo();
        return user == null ? "postgres" : user.split(":")[0];
    }

    private <T extends AutoCloseable> T closedLater(T one) {
        opened.add(one);
        return one;
    }
}
