// The agent for the peers in Go: `peers PEER`. What it is asked and answers is in ../README.md.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	// Ahead of a database that is asked for alone, so that a peer that makes one ahead has it ready.
	rest     = 100 * time.Millisecond
	work     = 25 * time.Millisecond
	countAll = "SELECT count(*) FROM t0"
)

var ctx = context.Background()

// errCannot is wrapped by what a peer has no way to do.
var errCannot = errors.New("cannot")

func cannot(why string) error { return fmt.Errorf("%w: %s", errCannot, why) }

// A server that runs.
type server struct {
	url    string
	pid    int
	places []string
	stop   func() error
}

// A database that somebody has.
type database struct {
	url    string
	giveUp func() error
}

// What a peer can be asked. Content is "empty" or "fifty".
type peer interface {
	prepare() error
	server() (server, error)
	template(content string) error
	database(content string) (database, error)
	// settle waits until all that was given back is dropped, where giving back does not wait; for
	// how long it has waited more than that.
	settle(content string) (time.Duration, error)
	end() error
}

type agent struct {
	peer    peer
	servers []server
	held    []database
}

func (a *agent) answer(words []string) (map[string]any, error) {
	command, rest := words[0], words[1:]
	var taken time.Duration
	var err error
	said := map[string]any{}
	switch command {
	case "prepare":
		return said, a.peer.prepare()
	case "server", "hold":
		var one server
		begun := time.Now()
		if one, err = a.peer.server(); err != nil {
			return nil, err
		}
		if err = ask(one.url, "SELECT 1"); err != nil {
			return nil, errors.Join(err, one.stop())
		}
		taken = time.Since(begun)
		if command == "server" {
			err = one.stop()
		} else {
			a.servers = append(a.servers, one)
			said["pid"], said["places"] = one.pid, one.places
		}
	case "database":
		taken, err = a.database()
	case "keep":
		return said, a.keep(number(rest[0]))
	case "sustained":
		taken, err = a.sustained(number(rest[0]), number(rest[1]), rest[2])
	case "suite":
		taken, err = a.suite(number(rest[0]), rest[1] == "waiting")
	default:
		err = fmt.Errorf("no such command: %s", command)
	}
	said["ms"] = taken.Seconds() * 1000
	return said, err
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

func (a *agent) keep(count int) error {
	if err := a.peer.template("fifty"); err != nil {
		return err
	}
	for range count {
		one, err := a.peer.database("fifty")
		if err != nil {
			return err
		}
		a.held = append(a.held, one)
	}
	return nil
}

func (a *agent) sustained(count, clients int, content string) (time.Duration, error) {
	if err := a.peer.template(content); err != nil {
		return 0, err
	}
	return a.together(count, clients, content)
}

// together has and gives back so many databases, by so many clients at once; the first are not timed.
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
	}); ok { // it has no database a test
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

func number(text string) int {
	value, err := strconv.Atoi(text)
	if err != nil {
		panic(err)
	}
	return value
}

func main() {
	if len(os.Args) != 2 || peers[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: peers PEER")
		os.Exit(2)
	}
	one := &agent{peer: peers[os.Args[1]]()}
	commands, answers := bufio.NewScanner(os.Stdin), json.NewEncoder(os.Stdout)
	for commands.Scan() {
		said, err := one.answer(strings.Fields(commands.Text()))
		if err != nil {
			said = map[string]any{"error": strings.ReplaceAll(err.Error(), "\n", "; ")}
		}
		if err := answers.Encode(said); err != nil {
			return
		}
	}
	for _, held := range one.held {
		_ = held.giveUp()
	}
	for _, held := range one.servers {
		_ = held.stop()
	}
	if err := one.peer.end(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}
