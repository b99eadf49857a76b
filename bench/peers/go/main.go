// The agent for the peers in Go: `peers PEER`. ../README.md describes its commands.
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
	"time"
)

const (
	// Before a single database is requested, so that a peer with a pool has one ready.
	rest     = 100 * time.Millisecond
	work     = 25 * time.Millisecond
	countAll = "SELECT count(*) FROM t0"
)

var ctx = context.Background()

// errCannot is wrapped by the error for a command that a peer does not support.
var errCannot = errors.New("cannot")

func cannot(why string) error { return fmt.Errorf("%w: %s", errCannot, why) }

// A running server.
type server struct {
	url  string
	data string
	dir  string // the parent of all its files
	stop func() error
}

// A database in use.
type database struct {
	url    string
	giveUp func() error
}

// The commands of a peer. Content is "empty" or "fifty".
type peer interface {
	prepare() error
	server() (server, error)
	template(content string) error
	database(content string) (database, error)
	// settle waits until all closed databases are dropped, if closing does not wait for that. It returns
	// the time that it has waited in addition.
	settle(content string) (time.Duration, error)
	end() error
}

type agent struct {
	peer    peer
	servers []server
}

func (a *agent) answer(words []string) (map[string]any, error) {
	reply := map[string]any{}
	var taken time.Duration
	var err error
	switch words[0] {
	case "prepare":
		return reply, a.peer.prepare()
	case "server", "hold":
		var one server
		if one, taken, err = a.server(); err != nil {
			return nil, err
		}
		if words[0] == "server" {
			err = one.stop()
			break
		}
		a.servers = append(a.servers, one)
		reply["directories"] = []string{one.dir}
		reply["pid"], err = one.postmaster()
	case "database":
		taken, err = a.database()
	case "sustained":
		taken, err = a.sustained(number(words[1]), number(words[2]), words[3])
	case "suite":
		taken, err = a.suite(number(words[1]), words[2] == "waiting")
	default:
		err = fmt.Errorf("no such command: %s", words[0])
	}
	reply["ms"] = taken.Seconds() * 1000
	return reply, err
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
		reply, err := one.answer(strings.Fields(commands.Text()))
		if err != nil {
			reply = map[string]any{"error": strings.ReplaceAll(err.Error(), "\n", "; ")}
		}
		if err := answers.Encode(reply); err != nil {
			return
		}
	}
	for _, held := range one.servers {
		_ = held.stop()
	}
	if err := one.peer.end(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}
