package accounts;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;

import java.sql.SQLException;
import javax.sql.DataSource;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.RegisterExtension;

class AccountsTest {
    @RegisterExtension final PgTemp pgtemp = new PgTemp();
    private Accounts accounts;
    private long ada;
    private long bob;

    @BeforeEach
    void twoAccounts() throws SQLException {
        DataSource database = pgtemp.pool();
        accounts = new Accounts(database);
        ada = accounts.open("ada", 100);
        bob = accounts.open("bob", 0);
    }

    @Test
    void aTransferMovesMoney() throws SQLException {
        accounts.transfer(ada, bob, 30);

        assertEquals(70, accounts.balance(ada));
        assertEquals(30, accounts.balance(bob));
    }

    @Test
    void anOverdraftChangesNothingAndHasItsSqlState() throws SQLException {
        var error = assertThrows(SQLException.class, () -> accounts.transfer(ada, bob, 101));

        assertEquals("23514", error.getSQLState());
        assertEquals(0, accounts.balance(bob));
    }

    @Test
    void anOwnerHasOneAccount() {
        var error = assertThrows(SQLException.class, () -> accounts.open("ada", 1));

        assertEquals("23505", error.getSQLState());
    }
}
