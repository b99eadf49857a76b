package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

type queryer interface {
	Exec(ctx context.Context, query string, arguments ...any) (pgconn.CommandTag, error)
	QueryRow(ctx context.Context, query string, arguments ...any) pgx.Row
}

// tables creates the fifty tables, unless they exist.
func tables(url string) error {
	connection, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer connection.Close(ctx)
	var there bool
	if err := connection.QueryRow(ctx, "SELECT to_regclass('t0') IS NOT NULL").Scan(&there); err != nil || there {
		return err
	}
	batch := ""
	for i := range 50 {
		batch += fmt.Sprintf("CREATE TABLE t%d (a int, b int, c int, d int);", i)
		for _, column := range []string{"a", "b", "c", "d"} {
			batch += fmt.Sprintf("CREATE INDEX ON t%d (%s);", i, column)
		}
	}
	_, err = connection.Exec(ctx, batch)
	return err
}

// body is the body of each test.
func body(in queryer, number int, waiting bool) error {
	if _, err := in.Exec(ctx, "INSERT INTO t0 VALUES ($1, 1, 1, 1)", number); err != nil {
		return err
	}
	if waiting {
		time.Sleep(work)
	}
	var rows int
	if err := in.QueryRow(ctx, countAll).Scan(&rows); err != nil {
		return err
	}
	if rows != 1 {
		return errors.New("the database is not fresh")
	}
	return nil
}

// ask connects, runs a query, and disconnects.
func ask(url, query string) error {
	connection, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	_, err = connection.Exec(ctx, query)
	return errors.Join(err, connection.Close(ctx))
}
