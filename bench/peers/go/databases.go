package main

import (
	"errors"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// peers are the available peers.
var peers = map[string]func() peer{
	"pgtest":            newPgtest,
	"embedded-postgres": func() peer { return embeddedPeer{} },
	"pgtestdb":          func() peer { return &pgtestdbPeer{} },
	"integresql":        func() peer { return &integresqlPeer{} },
	"pgtemp":            func() peer { return &pgtempPeer{} },
	"direct":            func() peer { return &directPeer{} },
	"rollback":          func() peer { return &rollbackPeer{} },
	"bare":              func() peer { return &barePeer{} },
}

// onServer is the part of a peer that uses a running server.
type onServer struct{}

func (onServer) prepare() error { return nil }

func (onServer) server() (server, error) {
	return server{}, cannot("it uses a running server")
}

func (onServer) settle(string) (time.Duration, error) { return 0, nil }
func (onServer) end() error                           { return nil }

// urlOf is the URL of a database of the server.
func urlOf(name string) string {
	given := os.Getenv("BENCH_SERVER")
	return given[:strings.LastIndex(given, "/")+1] + name
}

// makeOnce creates a database with that content, unless one with that name exists.
func makeOnce(name, content string) error {
	connection, err := pgx.Connect(ctx, os.Getenv("BENCH_SERVER"))
	if err != nil {
		return err
	}
	defer connection.Close(ctx)
	var there bool
	query := "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)"
	if err := connection.QueryRow(ctx, query, name).Scan(&there); err != nil || there {
		return err
	}
	if _, err := connection.Exec(ctx, "CREATE DATABASE "+name); err != nil || content == "empty" {
		return err
	}
	return tables(urlOf(name))
}

// directPeer uses an existing database.
type directPeer struct{ onServer }

func (directPeer) template(content string) error {
	return makeOnce("old_"+content, content)
}

func (directPeer) database(content string) (database, error) {
	return database{urlOf("old_" + content), func() error { return nil }}, nil
}

// rollbackPeer has one connection to an existing database, and rolls back each test.
type rollbackPeer struct {
	onServer
	connection *pgx.Conn
}

// Other peers clone their databases, which must have no connections then.
const rolledBack = "rolled_back"

func (rollbackPeer) template(content string) error { return makeOnce(rolledBack, content) }

func (rollbackPeer) database(string) (database, error) {
	return database{urlOf(rolledBack), func() error { return nil }}, nil
}

func (p *rollbackPeer) test(do func(queryer) error) (err error) {
	if p.connection == nil {
		if p.connection, err = pgx.Connect(ctx, urlOf(rolledBack)); err != nil {
			return err
		}
	}
	transaction, err := p.connection.Begin(ctx)
	if err != nil {
		return err
	}
	return errors.Join(do(transaction), transaction.Rollback(ctx))
}

// pgtempPeer is pgtemp's daemon.
type pgtempPeer struct {
	onServer
	made bool
}

func (p *pgtempPeer) template(content string) error {
	// Opening a template creates a new version of it.
	if content == "fifty" && !p.made {
		p.made = true
		return tables(os.Getenv("BENCH_SERVER") + "~template")
	}
	return nil
}

func (p *pgtempPeer) database(content string) (database, error) {
	url := os.Getenv("BENCH_SERVER")
	if content == "empty" {
		url = urlOf("empty")
	}
	return database{url, func() error { return nil }}, nil
}

func (p *pgtempPeer) settle(content string) (time.Duration, error) {
	one, err := p.database(content)
	if err != nil {
		return 0, err
	}
	return standstill(one.url, "%")
}

// More than twice as long as DROP DATABASE sleeps if a connection is just being closed.
const quiet = 300 * time.Millisecond

// standstill waits until the databases with such names, in the server of that URL, do not change any
// more; it returns for how long they have not changed.
func standstill(url, names string) (time.Duration, error) {
	watch, err := pgx.Connect(ctx, url)
	if err != nil {
		return 0, err
	}
	defer watch.Close(ctx)
	var before, now string
	query := "SELECT count(*) || ' ' || coalesce(max(oid::int8), 0) FROM pg_database WHERE datname LIKE $1"
	for changed := time.Now(); ; time.Sleep(time.Millisecond) {
		if err := watch.QueryRow(ctx, query, names).Scan(&now); err != nil {
			return 0, err
		}
		if now != before {
			before, changed = now, time.Now()
		} else if idle := time.Since(changed); idle > quiet {
			return idle, nil
		}
	}
}
