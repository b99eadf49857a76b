package main

import (
	"context"
	"database/sql"
	"fmt"
	"os"

	"github.com/jackc/pgx/v5"
	_ "github.com/jackc/pgx/v5/stdlib"
	"github.com/peterldowns/pgtestdb"
)

// pgtestdbPeer clones a template that it creates once, identified by its migrator's hash.
type pgtestdbPeer struct {
	onServer
	config pgtestdb.Config
}

// migrator creates the fifty tables, or nothing.
type migrator string

func (m migrator) Hash() (string, error) { return string(m), nil }

func (m migrator) Migrate(_ context.Context, _ *sql.DB, in pgtestdb.Config) error {
	if m == "fifty" {
		return tables(in.URL())
	}
	return nil
}

// test is the part of testing.T that pgtestdb needs; as there, Fatalf does not return.
type test struct{ cleanups []func() }

func (t *test) Cleanup(do func())                 { t.cleanups = append(t.cleanups, do) }
func (t *test) Failed() bool                      { return false }
func (t *test) Fatalf(format string, args ...any) { panic(fmt.Errorf(format, args...)) }
func (t *test) Helper()                           {}
func (t *test) Logf(string, ...any)               {}

func (t *test) end() (err error) {
	defer caught(&err)
	for i := len(t.cleanups) - 1; i >= 0; i-- {
		t.cleanups[i]()
	}
	return nil
}

func caught(err *error) {
	if found := recover(); found != nil {
		*err = fmt.Errorf("%v", found)
	}
}

func (p *pgtestdbPeer) template(content string) error {
	given, err := pgx.ParseConfig(os.Getenv("BENCH_SERVER"))
	if err != nil {
		return err
	}
	p.config = pgtestdb.Config{
		DriverName: "pgx", Host: given.Host, Port: fmt.Sprint(given.Port), User: given.User,
		Password: "unused", Database: given.Database, Options: "sslmode=disable",
	}
	one, err := p.database(content)
	if err != nil {
		return err
	}
	return one.giveUp()
}

func (p *pgtestdbPeer) database(content string) (one database, err error) {
	defer caught(&err)
	t := &test{}
	config := pgtestdb.Custom(t, p.config, migrator(content))
	return database{config.URL(), t.end}, nil
}
