package peers;

import java.io.Closeable;
import java.nio.file.Path;
import java.sql.Connection;
import java.util.List;

/** The commands of a peer. {@link Main} measures the times. */
interface Peer extends AutoCloseable {
    /** The content of the databases. */
    enum Content {
        EMPTY,
        FIFTY
    }

    /** A new server with a connection that has read its first row. Closing it removes the server. */
    record Server(long pid, List<Path> directories, Connection connection, Closeable end) implements AutoCloseable {
        @Override
        public void close() throws Exception {
            connection.close();
            end.close();
        }
    }

    /** The error for a command that a peer does not support. */
    final class Cannot extends Exception {
        Cannot(String reason) {
            super("cannot: " + reason);
        }
    }

    /** Does everything that may be done in advance, for all commands. */
    void prepare() throws Exception;

    /** Ensures that there is a template with this content, so that a measured database needs no template. */
    void template(Content content) throws Exception;

    /** A connection to an unused database, which is returned when the connection is closed. */
    Connection database(Content content) throws Exception;

    default Server server() throws Exception {
        throw new Cannot("it starts no servers");
    }

    /** The reason why the peer does not support `sustained`, or null. */
    default String unsustained() {
        return null;
    }
}
