package stock_test

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"net/url"
	"os"
	"sync"
	"testing"
	"time"

	"example.org/stock"
	"github.com/lib/pq"
)

// open opens a pool with DATABASE_URL, or with a session of it.
func open(t *testing.T, session string) *sql.DB {
	t.Helper()
	parsed, err := url.Parse(os.Getenv("DATABASE_URL"))
	if err != nil || parsed.Host == "" {
		t.Fatal("DATABASE_URL does not lead to a daemon: see README.md")
	}
	parsed.Path += session
	db, err := sql.Open("postgres", parsed.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// openStock opens a pool in a session of its own, whose connections share one migrated database.
func openStock(t *testing.T) *sql.DB {
	t.Helper()
	db := open(t, "~"+rand.Text())
	if err := stock.Migrate(t.Context(), db); err != nil {
		t.Fatal(err)
	}
	return db
}

func connections(t *testing.T, db *sql.DB, number int) []*sql.Conn {
	t.Helper()
	var conns []*sql.Conn
	for range number {
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conns = append(conns, conn)
	}
	return conns
}

func mustAdd(t *testing.T, db *sql.DB, name string, amount int) {
	t.Helper()
	if err := stock.Add(t.Context(), db, name, amount); err != nil {
		t.Fatal(err)
	}
}

func wantAmount(t *testing.T, db *sql.DB, name string, want int) {
	t.Helper()
	if amount, err := stock.Amount(t.Context(), db, name); err != nil || amount != want {
		t.Errorf("%s: %d (%v), want %d", name, amount, err, want)
	}
}

func wantSQLState(t *testing.T, err error, want string) {
	t.Helper()
	var refused *pq.Error
	if !errors.As(err, &refused) || refused.SQLState() != want {
		t.Fatalf("error is %v, want SQLSTATE %s", err, want)
	}
}

func TestEachConnectionHasItsOwnDatabase(t *testing.T) {
	for range 2 { // in a shared database the second CREATE TABLE would fail
		db := open(t, "")
		if _, err := db.ExecContext(t.Context(), "CREATE TABLE mine (n int)"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPoolWithoutASessionIsManyDatabases(t *testing.T) {
	for _, conn := range connections(t, open(t, ""), 2) {
		if _, err := conn.ExecContext(t.Context(), "CREATE TABLE mine (n int)"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPoolSharesOneDatabase(t *testing.T) {
	db := openStock(t)
	mustAdd(t, db, "apple", 3)
	for _, conn := range connections(t, db, 4) {
		var amount int
		row := conn.QueryRowContext(t.Context(), "SELECT amount FROM item")
		if err := row.Scan(&amount); err != nil || amount != 3 {
			t.Errorf("%d (%v), want 3", amount, err)
		}
	}
}

func TestTakingAtOnce(t *testing.T) {
	db := openStock(t)
	mustAdd(t, db, "apple", 20)
	var takers sync.WaitGroup
	for range 20 {
		takers.Go(func() {
			if err := stock.Take(t.Context(), db, map[string]int{"apple": 1}); err != nil {
				t.Error(err)
			}
		})
	}
	takers.Wait()
	wantAmount(t, db, "apple", 0)
}

func TestTwoSessionsDoNotSeeEachOther(t *testing.T) {
	one, other := openStock(t), openStock(t)
	mustAdd(t, one, "apple", 3)
	if _, err := stock.Amount(t.Context(), other, "apple"); !errors.Is(err, sql.ErrNoRows) {
		t.Errorf("error is %v, want none of one's apples", err)
	}
}

func TestQueryContextIsCancelled(t *testing.T) {
	db := openStock(t)
	mustAdd(t, db, "apple", 3)

	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	rows, err := db.QueryContext(ctx, "SELECT pg_sleep(60)")
	if err == nil {
		rows.Close()
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		wantSQLState(t, err, "57014") // query_canceled
	}

	// pq discards that connection; the pool opens another one, in the same database.
	wantAmount(t, db, "apple", 3)
	awaitNobodySleeps(t, db)
}

// awaitNobodySleeps waits until the server has cancelled the statement.
func awaitNobodySleeps(t *testing.T, db *sql.DB) {
	t.Helper()
	const asleep = `SELECT count(*) FROM pg_stat_activity
		WHERE datname = current_database() AND wait_event = 'PgSleep'`
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		var sleepers int
		if err := db.QueryRowContext(t.Context(), asleep).Scan(&sleepers); err != nil {
			t.Fatal(err)
		}
		if sleepers == 0 {
			return
		}
	}
	t.Error("the statement goes on")
}

func TestErrorKeepsItsSQLState(t *testing.T) {
	db := openStock(t)
	mustAdd(t, db, "apple", 3)
	mustAdd(t, db, "pear", 1)
	err := stock.Take(t.Context(), db, map[string]int{"apple": 2, "pear": 2})
	wantSQLState(t, err, "23514") // check_violation
	wantAmount(t, db, "apple", 3)

	_, err = db.ExecContext(t.Context(), "SELECT 1/0")
	wantSQLState(t, err, "22012") // division_by_zero
}
