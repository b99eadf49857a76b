package peers;

import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.sql.Connection;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.stream.Collectors;
import peers.Peer.Cannot;
import peers.Peer.Content;
import peers.Peer.Server;

/** The agent for the peers in Java, with the peer as its argument. The README above describes its commands. */
public final class Main {
    /** Before a single database is requested, so that a peer with a pool has one ready. */
    private static final int REST_MS = 100;

    private static final int TEST_WAITS_MS = 25;

    private final Peer peer;
    private final List<Server> held = new ArrayList<>();

    private Main(Peer peer) {
        this.peer = peer;
    }

    public static void main(String[] arguments) throws Exception {
        String name = arguments.length == 1 ? arguments[0] : "";
        Peer peer =
                switch (name) {
                    case "zonky" -> new Zonky();
                    case "pgtemp" -> new PgTemp();
                    default -> throw new IllegalArgumentException("usage: peers.Main zonky | pgtemp");
                };
        new Main(peer).serve();
    }

    private void serve() throws Exception {
        var commands = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String command = commands.readLine(); command != null; command = commands.readLine()) {
            System.out.println("{" + answer(command) + "}");
        }
        for (Server server : held) {
            server.close();
        }
        peer.close();
    }

    private String answer(String command) {
        try {
            return runCommand(command.strip().split("\\s+"));
        } catch (Cannot cannot) {
            return "\"error\": " + quoted(cannot.getMessage());
        } catch (Exception error) {
            error.printStackTrace();
            return "\"error\": " + quoted(error.toString());
        }
    }

    private String runCommand(String[] words) throws Exception {
        switch (words[0]) {
            case "prepare":
                peer.prepare();
                return "";
            case "server":
                return server();
            case "hold":
                return hold();
            case "database":
                return database();
            case "sustained":
                Content content = Content.valueOf(words[3].toUpperCase());
                return sustained(Integer.parseInt(words[1]), Integer.parseInt(words[2]), content);
            case "suite":
                return suite(Integer.parseInt(words[1]), words[2].equals("waiting"));
            default:
                throw new IllegalArgumentException("no such command: " + words[0]);
        }
    }

    private String server() throws Exception {
        long begun = System.nanoTime();
        try (Server server = peer.server()) {
            return since(begun);
        }
    }

    private String hold() throws Exception {
        long begun = System.nanoTime();
        Server server = peer.server();
        String taken = since(begun);
        held.add(server);
        String directories =
                server.directories().stream().map(Path::toString).map(Main::quoted).collect(Collectors.joining(", "));
        return "%s, \"pid\": %d, \"directories\": [%s]".formatted(taken, server.pid(), directories);
    }

    private String database() throws Exception {
        peer.template(Content.FIFTY);
        Thread.sleep(REST_MS);
        long begun = System.nanoTime();
        try (Connection connection = peer.database(Content.FIFTY)) {
            Tables.expect(connection, "SELECT count(*) FROM t0", 0);
            return since(begun);
        }
    }

    private String sustained(int count, int clients, Content content) throws Exception {
        if (peer.unsustained() != null) {
            throw new Cannot(peer.unsustained());
        }
        peer.template(content);
        AtomicInteger asked = new AtomicInteger();
        Callable<Void> client = () -> {
            while (asked.getAndIncrement() < count) {
                try (Connection connection = peer.database(content)) {
                    Tables.expect(connection, "SELECT 1", 1);
                }
            }
            return null;
        };
        ExecutorService threads = Executors.newFixedThreadPool(clients);
        try {
            long begun = System.nanoTime();
            List<Future<Void>> running = new ArrayList<>();
            for (int i = 0; i < clients; i++) {
                running.add(threads.submit(client));
            }
            for (Future<Void> one : running) {
                one.get();
            }
            return since(begun);
        } finally {
            threads.shutdownNow();
        }
    }

    private String suite(int count, boolean waiting) throws Exception {
        peer.template(Content.FIFTY);
        long begun = System.nanoTime();
        for (int i = 0; i < count; i++) {
            try (Connection connection = peer.database(Content.FIFTY)) {
                Tables.insert(connection, i);
                if (waiting) {
                    Thread.sleep(TEST_WAITS_MS);
                }
                Tables.expect(connection, "SELECT count(*) FROM t0", 1);
            }
        }
        return since(begun);
    }

    private static String since(long begun) {
        return "\"ms\": " + (System.nanoTime() - begun) / 1e6;
    }

    private static String quoted(String text) {
        StringBuilder json = new StringBuilder("\"");
        for (char one : text.toCharArray()) {
            if (one == '"' || one == '\\') {
                json.append('\\').append(one);
            } else if (one < ' ') {
                json.append("\\u%04x".formatted((int) one));
            } else {
                json.append(one);
            }
        }
        return json.append('"').toString();
    }
}
