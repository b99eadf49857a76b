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
	"time"
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
	url   string
	data  string
	place string // all that it has
	stop  func() error
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
}

func (a *agent) answer(words []string) (map[string]any, error) {
	said := map[string]any{}
	var taken time.Duration
	var err error
	switch words[0] {
	case "prepare":
		return said, a.peer.prepare()
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
		said["places"] = []string{one.place}
		said["pid"], err = one.postmaster()
	case "database":
		taken, err = a.database()
	case "sustained":
		taken, err = a.sustained(number(words[1]), number(words[2]), words[3])
	case "suite":
		taken, err = a.suite(number(words[1]), words[2] == "waiting")
	default:
		err = fmt.Errorf("no such command: %s", words[0])
	}
	said["ms"] = taken.Seconds() * 1000
	return said, err
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
	for _, held := range one.servers {
		_ = held.stop()
	}
	if err := one.peer.end(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}
