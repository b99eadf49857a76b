package peers;

import java.io.Closeable;
import java.nio.file.Path;
import java.sql.Connection;
import java.util.List;

/** What a peer can be asked. {@link Main} takes the times. */
interface Peer extends AutoCloseable {
    /** What is in the databases. */
    enum Content {
        EMPTY,
        FIFTY
    }

    /** A new server with a connection that has had its first row. Closing it takes it away. */
    record Server(long pid, List<Path> places, Connection connection, Closeable end) implements AutoCloseable {
        @Override
        public void close() throws Exception {
            connection.close();
            end.close();
        }
    }

    /** What a peer says of a command that it does not have. */
    final class Cannot extends Exception {
        Cannot(String reason) {
            super("cannot: " + reason);
        }
    }

    /** Does what may be done ahead, for all commands. */
    void prepare() throws Exception;

    /** Has a template with this content, so that a database costs no more than a database. */
    void template(Content content) throws Exception;

    /** A connection to a database that nobody has used, which is given back when the connection is closed. */
    Connection database(Content content) throws Exception;

    default Server server() throws Exception {
        throw new Cannot("it starts no servers");
    }

    /** Why `sustained` is not asked of it, or null. */
    default String unsustained() {
        return null;
    }
}
