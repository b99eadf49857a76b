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

// barePeer is the lower bound: two connections create databases in advance and drop used ones.
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

// serve drops used databases as soon as there are any, and otherwise creates new ones.
func (s *stock) serve(connection *pgx.Conn, source string) {
	defer connection.Close(ctx)
	for {
		name := fmt.Sprintf("bare_%d_%d", os.Getpid(), numbered.Add(1))
		create := fmt.Sprintf("CREATE DATABASE %s TEMPLATE %s STRATEGY file_copy", name, source)
		for {
			// Two connections may use the same source concurrently.
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
	from, dropped := p.stocks[content], make(chan struct{})
	go func() {
		from.dropped.Wait()
		close(dropped)
	}()
	select {
	case err := <-from.failed:
		return 0, err
	case <-dropped:
		return 0, nil
	}
}

// end drops the ready databases. No others are created meanwhile: both creators wait until theirs are taken.
func (p *barePeer) end() error {
	connection, err := pgx.Connect(ctx, os.Getenv("BENCH_SERVER"))
	if err != nil {
		return err
	}
	defer connection.Close(ctx)
	for content := range p.stocks {
		if _, err := p.settle(content); err != nil {
			return err
		}
	}
	query := "SELECT datname FROM pg_database WHERE datname LIKE $1"
	rows, err := connection.Query(ctx, query, fmt.Sprintf("bare_%d_%%", os.Getpid()))
	if err != nil {
		return err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	for _, name := range names {
		_, failed := connection.Exec(ctx, "DROP DATABASE "+name)
		err = errors.Join(err, failed)
	}
	return err
}
