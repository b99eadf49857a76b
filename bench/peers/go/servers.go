package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	embedded "github.com/fergusstrange/embedded-postgres"
	"github.com/rubenv/pgtest"
)

// startsServers is the part of a peer that only starts servers.
type startsServers struct{}

func (startsServers) prepare() error { return nil }

func (startsServers) template(string) error {
	return cannot("it has one server per database, and no templates")
}

func (startsServers) database(string) (database, error)    { return database{}, errCannot }
func (startsServers) settle(string) (time.Duration, error) { return 0, nil }
func (startsServers) end() error                           { return nil }

type pgtestPeer struct{ startsServers }

// newPgtest creates the locale that pgtest requires, even if the machine does not have it.
func newPgtest() peer {
	locales := filepath.Join(os.Getenv("BENCH_CACHE"), "locales")
	if err := os.MkdirAll(locales, 0o755); err == nil {
		made := exec.Command("localedef", "-i", "en_US", "-f", "UTF-8", filepath.Join(locales, "en_US.UTF-8"))
		if made.Run() == nil {
			os.Setenv("LOCPATH", locales)
		}
	}
	return pgtestPeer{}
}

func (pgtestPeer) server() (server, error) {
	dir, err := os.MkdirTemp(os.Getenv("BENCH_DATA"), "")
	if err != nil {
		return server{}, err
	}
	one, err := pgtest.New().From(os.Getenv("BENCH_BIN")).DataDir(dir).Start()
	if err != nil {
		return server{}, err
	}
	// Its own connection uses a new database, which is the one to measure.
	url := fmt.Sprintf("postgres://%s@/%s?host=%s&sslmode=disable", one.User, one.Name, one.Host)
	return server{url, filepath.Join(dir, "data"), dir, func() error {
		if err := one.Stop(); err != nil {
			return err
		}
		return os.RemoveAll(dir)
	}}, nil
}

type embeddedPeer struct{ startsServers }

func (embeddedPeer) server() (server, error) {
	dir, err := os.MkdirTemp(os.Getenv("BENCH_DATA"), "")
	if err != nil {
		return server{}, err
	}
	port, err := freePort()
	if err != nil {
		return server{}, err
	}
	one := embedded.NewDatabase(embedded.DefaultConfig().
		Port(uint32(port)).
		BinariesPath(filepath.Dir(os.Getenv("BENCH_BIN"))).
		RuntimePath(filepath.Join(dir, "run")).
		DataPath(filepath.Join(dir, "data")).
		StartParameters(map[string]string{
			"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off",
			"unix_socket_directories": dir,
		}).
		StartTimeout(30 * time.Second).
		Logger(nil))
	if err := one.Start(); err != nil {
		return server{}, err
	}
	url := fmt.Sprintf("postgres://postgres:postgres@127.0.0.1:%d/postgres?sslmode=disable", port)
	return server{url, filepath.Join(dir, "data"), dir, func() error {
		if err := one.Stop(); err != nil {
			return err
		}
		return os.RemoveAll(dir)
	}}, nil
}

// postmaster is the pid of a server.
func (s server) postmaster() (int, error) {
	text, err := os.ReadFile(filepath.Join(s.data, "postmaster.pid"))
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(text), "\n")
	return strconv.Atoi(first)
}

func freePort() (int, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port, nil
}
