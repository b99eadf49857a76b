package accounts;

import java.sql.Connection;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import javax.sql.DataSource;

/** Accounts, and transfers between them. */
public final class Accounts {
    private final DataSource database;

    public Accounts(DataSource database) {
        this.database = database;
    }

    public long open(String owner, long balance) throws SQLException {
        String insert = "INSERT INTO account (owner, balance) VALUES (?, ?) RETURNING id";
        try (Connection connection = database.getConnection();
                PreparedStatement statement = connection.prepareStatement(insert)) {
            statement.setString(1, owner);
            statement.setLong(2, balance);
            return number(statement);
        }
    }

    public long balance(long account) throws SQLException {
        String select = "SELECT balance FROM account WHERE id = ?";
        try (Connection connection = database.getConnection();
                PreparedStatement statement = connection.prepareStatement(select)) {
            statement.setLong(1, account);
            return number(statement);
        }
    }

    /** Moves an amount: both accounts change, or neither does. */
    public void transfer(long from, long to, long amount) throws SQLException {
        try (Connection connection = database.getConnection()) {
            connection.setAutoCommit(false);
            try {
                change(connection, to, amount);
                change(connection, from, -amount);
                connection.commit();
            } catch (SQLException error) {
                connection.rollback();
                throw error;
            }
        }
    }

    private static void change(Connection connection, long account, long by) throws SQLException {
        String update = "UPDATE account SET balance = balance + ? WHERE id = ?";
        try (PreparedStatement statement = connection.prepareStatement(update)) {
            statement.setLong(1, by);
            statement.setLong(2, account);
            statement.executeUpdate();
        }
    }

    private static long number(PreparedStatement statement) throws SQLException {
        try (ResultSet rows = statement.executeQuery()) {
            rows.next();
            return rows.getLong(1);
        }
    }
}
