// Package bank stores accounts in PostgreSQL, through a pgx pool.
package bank

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Configure makes pgx cancel the statement in the server when its context ends, so that the
// connection remains usable. By default pgx only closes the connection.
func Configure(config *pgconn.Config) {
	config.BuildContextWatcherHandler = func(conn *pgconn.PgConn) ctxwatch.Handler {
		return &pgconn.CancelRequestContextWatcherHandler{Conn: conn, DeadlineDelay: 10 * time.Second}
	}
}

// Open returns a pool of connections to the database at url.
func Open(ctx context.Context, url string) (*pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	Configure(&config.ConnConfig.Config)
	return pgxpool.NewWithConfig(ctx, config)
}

// DB has the methods that a pool, a connection and a transaction have in common.
type DB interface {
	Begin(ctx context.Context) (pgx.Tx, error)
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// OpenAccount opens an account with an initial balance.
func OpenAccount(ctx context.Context, db DB, number, balance int) error {
	_, err := db.Exec(ctx, "INSERT INTO account VALUES ($1, $2)", number, balance)
	return err
}

// Transfer moves an amount from one account to another, or changes nothing.
func Transfer(ctx context.Context, db DB, source, target, amount int) error {
	const add = "UPDATE account SET balance = balance + $2 WHERE number = $1"
	return pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, add, target, amount); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, add, source, -amount); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "INSERT INTO transfer VALUES ($1, $2, $3)", source, target, amount)
		return err
	})
}

// Total returns the sum of all balances.
func Total(ctx context.Context, db DB) (total int, err error) {
	err = db.QueryRow(ctx, "SELECT coalesce(sum(balance), 0)::int FROM account").Scan(&total)
	return total, err
}
