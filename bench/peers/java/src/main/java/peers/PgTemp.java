package peers;

import java.net.URI;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.SQLException;
import java.util.Properties;

/** Our pgtemp, from Java: its daemon, and the PostgreSQL driver. */
final class PgTemp implements Peer {
    private static final int WARM_UP = 20;

    private final String url;
    private final Properties login = new Properties();
    private boolean templateIsThere;

    PgTemp() {
        URI server = URI.create(System.getenv("BENCH_SERVER"));
        url = "jdbc:postgresql://" + server.getHost() + ":" + server.getPort() + server.getPath();
        String[] user = server.getUserInfo() == null ? new String[] {"postgres"} : server.getUserInfo().split(":", 2);
        login.setProperty("user", user[0]);
        if (user.length == 2) {
            login.setProperty("password", user[1]);
        }
    }

    @Override
    public void prepare() throws SQLException {
        template(Content.FIFTY);
    }

    /** Builds the template through the URL, as in its README, unless the daemon has it; warms up the JVM. */
    @Override
    public void template(Content content) throws SQLException {
        if (templateIsThere) {
            return;
        }
        try (Connection connection = DriverManager.getConnection(url + "~template", login)) {
            if (!Tables.areThere(connection)) {
                Tables.make(connection);
            }
        }
        templateIsThere = true;
        for (int i = 0; i < WARM_UP; i++) {
            try (Connection connection = database(content)) {
                Tables.expect(connection, "SELECT count(*) FROM t0", 0);
            }
        }
    }

    @Override
    public Connection database(Content content) throws SQLException {
        return DriverManager.getConnection(url, login);
    }

    @Override
    public String unsustained() {
        return "a client of the daemon cannot find out when all databases are dropped";
    }

    @Override
    public void close() {}
}
