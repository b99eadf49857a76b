package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
)

// peers are those that there are.
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

// onServer is the part of a peer that works on a server that is there.
type onServer struct{}

func (onServer) prepare() error { return nil }

func (onServer) server() (server, error) {
	return server{}, cannot("it works on a server that is there")
}

func (onServer) settle(string) (time.Duration, error) { return 0, nil }
func (onServer) end() error                           { return nil }

// urlOf is that of a database of the server.
func urlOf(name string) string {
	given := os.Getenv("BENCH_SERVER")
	return given[:strings.LastIndex(given, "/")+1] + name
}

// makeOnce makes an old database of that content, unless there is one of that name.
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

// directPeer has an old database.
type directPeer struct{ onServer }

func (directPeer) template(content string) error {
	return makeOnce("old_"+content, content)
}

func (directPeer) database(content string) (database, error) {
	return database{urlOf("old_" + content), func() error { return nil }}, nil
}

// rollbackPeer has one connection to an old database, and rolls back what tests do.
type rollbackPeer struct {
	onServer
	connection *pgx.Conn
}

// Others clone their old databases, which nobody may be connected to then.
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

// barePeer is the floor: two connections that make databases ahead and drop those that were used.
type barePeer struct {
	onServer
	stocks map[string]*stock
}

type stock struct {
	ready   chan string
	used    chan string
	dropped sync.WaitGroup
	failed  chan error
}

const creators = 2

var numbered atomic.Int64

func (p *barePeer) template(content string) error {
	if p.stocks[content] != nil {
		return nil
	}
	source := "bare_" + content
	if err := makeOnce(source, content); err != nil {
		return err
	}
	made := &stock{
		ready: make(chan string, creators), used: make(chan string, 4096), failed: make(chan error, creators),
	}
	for range creators {
		connection, err := pgx.Connect(ctx, os.Getenv("BENCH_SERVER"))
		if err != nil {
			return err
		}
		go made.serve(connection, source)
	}
	if p.stocks == nil {
		p.stocks = map[string]*stock{}
	}
	p.stocks[content] = made
	return nil
}

// serve drops what was used as soon as there is anything, and makes what is wanted otherwise.
func (s *stock) serve(connection *pgx.Conn, source string) {
	defer connection.Close(ctx)
	for {
		name := fmt.Sprintf("bare_%d_%d", os.Getpid(), numbered.Add(1))
		create := fmt.Sprintf("CREATE DATABASE %s TEMPLATE %s STRATEGY file_copy", name, source)
		for {
			// Two connections at once may want the same source.
			_, err := connection.Exec(ctx, create)
			if err == nil {
				break
			}
			if !strings.Contains(err.Error(), "55006") {
				s.failed <- err
				return
			}
			time.Sleep(time.Millisecond)
		}
		for waiting := true; waiting; {
			select {
			case s.ready <- name:
				waiting = false
			case used := <-s.used:
				if _, err := connection.Exec(ctx, "DROP DATABASE "+used+" WITH (FORCE)"); err != nil {
					s.failed <- err
					return
				}
				s.dropped.Done()
			}
		}
	}
}

func (p *barePeer) database(content string) (database, error) {
	from := p.stocks[content]
	select {
	case err := <-from.failed:
		return database{}, err
	case name := <-from.ready:
		return database{urlOf(name), func() error {
			from.dropped.Add(1)
			from.used <- name
			return nil
		}}, nil
	}
}

func (p *barePeer) settle(content string) (time.Duration, error) {
	p.stocks[content].dropped.Wait()
	return 0, nil
}

// pgtempPeer is pgtemp's daemon.
type pgtempPeer struct {
	onServer
	made bool
}

func (p *pgtempPeer) template(content string) error {
	// Whoever opens a template makes a new one.
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

const quiet = 200 * time.Millisecond

// settle waits until the number of databases in the server that these come from stays what it is.
func (p *pgtempPeer) settle(content string) (time.Duration, error) {
	one, err := p.database(content)
	if err != nil {
		return 0, err
	}
	watch, err := pgx.Connect(ctx, one.url)
	if err != nil {
		return 0, err
	}
	defer watch.Close(ctx)
	var before, now int
	for changed := time.Now(); ; time.Sleep(time.Millisecond) {
		if err := watch.QueryRow(ctx, "SELECT count(*) FROM pg_database").Scan(&now); err != nil {
			return 0, err
		}
		if now != before {
			before, changed = now, time.Now()
		} else if idle := time.Since(changed); idle > quiet {
			return idle, nil
		}
	}
}
