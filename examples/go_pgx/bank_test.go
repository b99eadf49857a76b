package bank_test

import (
	"context"
	"crypto/rand"
	"errors"
	"net/url"
	"os"
	"sync"
	"testing"
	"time"

	"example.org/bank"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// databaseURL returns a URL; each connection to it gets a database of its own.
func databaseURL(t *testing.T) *url.URL {
	t.Helper()
	parsed, err := url.Parse(os.Getenv("DATABASE_URL"))
	if err != nil || parsed.Host == "" {
		t.Fatal("DATABASE_URL does not lead to a daemon: see README.md")
	}
	return parsed
}

// connect opens one connection, with a new and migrated database.
func connect(t *testing.T) *pgx.Conn {
	t.Helper()
	config, err := pgx.ParseConfig(databaseURL(t).String())
	if err != nil {
		t.Fatal(err)
	}
	bank.Configure(&config.Config)
	conn, err := pgx.ConnectConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// openPool opens a pool in a session of its own, so that all its connections share one database.
func openPool(t *testing.T) *pgxpool.Pool {
	t.Helper()
	session := databaseURL(t)
	session.Path += "~" + rand.Text()
	pool, err := bank.Open(t.Context(), session.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

func mustOpenAccount(t *testing.T, db bank.DB, number, balance int) {
	t.Helper()
	if err := bank.OpenAccount(t.Context(), db, number, balance); err != nil {
		t.Fatal(err)
	}
}

func wantTotal(t *testing.T, db bank.DB, want int) {
	t.Helper()
	total, err := bank.Total(t.Context(), db)
	if err != nil {
		t.Fatal(err)
	}
	if total != want {
		t.Errorf("total is %d, want %d", total, want)
	}
}

func wantSQLState(t *testing.T, err error, want string) {
	t.Helper()
	var refused *pgconn.PgError
	if !errors.As(err, &refused) || refused.Code != want {
		t.Fatalf("error is %v, want SQLSTATE %s", err, want)
	}
}

func TestEachConnectionHasItsOwnDatabase(t *testing.T) {
	first := connect(t)
	mustOpenAccount(t, first, 1, 100)
	wantTotal(t, first, 100)
	wantTotal(t, connect(t), 0)
}

func TestPoolSharesOneDatabase(t *testing.T) {
	pool := openPool(t)
	mustOpenAccount(t, pool, 1, 100)

	var conns []*pgxpool.Conn // acquired at the same time, so they are different connections
	for range 4 {
		conn, err := pool.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Release()
		conns = append(conns, conn)
	}
	for _, conn := range conns {
		wantTotal(t, conn, 100)
	}
}

func TestTransfersAtOnce(t *testing.T) {
	pool := openPool(t)
	mustOpenAccount(t, pool, 1, 100)
	mustOpenAccount(t, pool, 2, 0)

	var transfers sync.WaitGroup
	for range 20 {
		transfers.Go(func() {
			if err := bank.Transfer(t.Context(), pool, 1, 2, 5); err != nil {
				t.Error(err)
			}
		})
	}
	transfers.Wait()
	wantTotal(t, pool, 100)
	wantSQLState(t, bank.Transfer(t.Context(), pool, 1, 2, 1), "23514") // the balance is 0
}

func TestTwoSessionsDoNotSeeEachOther(t *testing.T) {
	one, other := openPool(t), openPool(t)
	mustOpenAccount(t, one, 1, 100)
	wantTotal(t, other, 0)
	mustOpenAccount(t, other, 1, 7)
	wantTotal(t, one, 100)
}

func TestDeadlineCancelsTheStatement(t *testing.T) {
	conn := connect(t)
	mustOpenAccount(t, conn, 1, 100)

	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := conn.Exec(ctx, "SELECT pg_sleep(60)")
	wantSQLState(t, err, "57014") // query_canceled

	wantTotal(t, conn, 100) // on the same connection, in the same database
}

func TestPoolGoesOnAfterADeadline(t *testing.T) {
	pool := openPool(t)
	mustOpenAccount(t, pool, 1, 100)

	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := pool.Exec(ctx, "SELECT pg_sleep(60)")
	wantSQLState(t, err, "57014")

	wantTotal(t, pool, 100)
	if opened := pool.Stat().NewConnsCount(); opened != 1 {
		t.Errorf("%d connections were opened, want the first to be kept", opened)
	}
}

func TestErrorKeepsItsSQLState(t *testing.T) {
	conn := connect(t)
	mustOpenAccount(t, conn, 1, 100)
	wantSQLState(t, bank.OpenAccount(t.Context(), conn, 1, 5), "23505")   // unique_violation
	wantSQLState(t, bank.Transfer(t.Context(), conn, 1, 2, 500), "23514") // check_violation
	wantTotal(t, conn, 100)
}
