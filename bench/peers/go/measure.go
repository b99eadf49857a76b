package main

import (
	"errors"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// server starts a server, and waits until it answers.
func (a *agent) server() (server, time.Duration, error) {
	begun := time.Now()
	one, err := a.peer.server()
	if err != nil {
		return one, 0, err
	}
	if err = ask(one.url, "SELECT 1"); err != nil {
		return one, 0, errors.Join(err, one.stop())
	}
	return one, time.Since(begun), nil
}

func (a *agent) database() (time.Duration, error) {
	if err := a.peer.template("fifty"); err != nil {
		return 0, err
	}
	time.Sleep(rest)
	begun := time.Now()
	one, err := a.peer.database("fifty")
	if err != nil {
		return 0, err
	}
	connection, err := pgx.Connect(ctx, one.url)
	if err != nil {
		return 0, err
	}
	var rows int
	err = connection.QueryRow(ctx, countAll).Scan(&rows)
	taken := time.Since(begun)
	return taken, errors.Join(err, connection.Close(ctx), one.giveUp())
}

func (a *agent) sustained(count, clients int, content string) (time.Duration, error) {
	if err := a.peer.template(content); err != nil {
		return 0, err
	}
	return a.together(count, clients, content)
}

// together opens and closes a number of databases with a number of concurrent clients; the first are not timed.
func (a *agent) together(count, clients int, content string) (time.Duration, error) {
	if err := a.use(2*clients+8, clients, content); err != nil {
		return 0, err
	}
	if _, err := a.peer.settle(content); err != nil {
		return 0, err
	}
	begun := time.Now()
	if err := a.use(count, clients, content); err != nil {
		return 0, err
	}
	idle, err := a.peer.settle(content)
	return time.Since(begun) - idle, err
}

func (a *agent) use(count, clients int, content string) error {
	todo, failed := make(chan int), make([]error, clients)
	var running sync.WaitGroup
	for client := range clients {
		running.Add(1)
		go func() {
			defer running.Done()
			for range todo {
				one, err := a.peer.database(content)
				if err == nil {
					err = errors.Join(ask(one.url, "SELECT 1"), one.giveUp())
				}
				failed[client] = errors.Join(failed[client], err)
			}
		}()
	}
	for i := range count {
		todo <- i
	}
	close(todo)
	running.Wait()
	return errors.Join(failed...)
}

func (a *agent) suite(count int, waiting bool) (time.Duration, error) {
	if err := a.peer.template("fifty"); err != nil {
		return 0, err
	}
	if err := a.use(8, 1, "fifty"); err != nil {
		return 0, err
	}
	if _, err := a.peer.settle("fifty"); err != nil {
		return 0, err
	}
	begun := time.Now()
	for i := range count {
		if err := a.test(i, waiting); err != nil {
			return 0, err
		}
	}
	idle, err := a.peer.settle("fifty")
	return time.Since(begun) - idle, err
}

func (a *agent) test(number int, waiting bool) error {
	if in, ok := a.peer.(interface {
		test(func(queryer) error) error
	}); ok { // the peer has no database per test
		return in.test(func(q queryer) error { return body(q, number, waiting) })
	}
	one, err := a.peer.database("fifty")
	if err != nil {
		return err
	}
	connection, err := pgx.Connect(ctx, one.url)
	if err != nil {
		return err
	}
	return errors.Join(body(connection, number, waiting), connection.Close(ctx), one.giveUp())
}
