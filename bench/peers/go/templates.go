package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5"
	_ "github.com/jackc/pgx/v5/stdlib"
	"github.com/peterldowns/pgtestdb"
)

// pgtestdbPeer clones a template that it makes once, by its migrator's hash.
type pgtestdbPeer struct {
	onServer
	config pgtestdb.Config
}

// migrator makes the fifty tables, or nothing.
type migrator string

func (m migrator) Hash() (string, error) { return string(m), nil }

func (m migrator) Migrate(_ context.Context, _ *sql.DB, in pgtestdb.Config) error {
	if m == "fifty" {
		return tables(in.URL())
	}
	return nil
}

// test is what pgtestdb needs of a testing.T.
type test struct {
	cleanups []func()
	failed   error
}

func (t *test) Cleanup(do func())                 { t.cleanups = append(t.cleanups, do) }
func (t *test) Failed() bool                      { return t.failed != nil }
func (t *test) Fatalf(format string, args ...any) { t.failed = fmt.Errorf(format, args...) }
func (t *test) Helper()                           {}
func (t *test) Logf(string, ...any)               {}

func (t *test) end() error {
	for i := len(t.cleanups) - 1; i >= 0; i-- {
		t.cleanups[i]()
	}
	return t.failed
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

func (p *pgtestdbPeer) database(content string) (database, error) {
	t := &test{}
	config := pgtestdb.Custom(t, p.config, migrator(content))
	if t.failed != nil {
		return database{}, t.failed
	}
	return database{config.URL(), t.end}, nil
}

// integresqlPeer runs its server, and asks that over HTTP, as every language does.
type integresqlPeer struct {
	onServer
	process *exec.Cmd
	base    string
	made    map[string]bool
}

func (p *integresqlPeer) prepare() error {
	given, err := pgx.ParseConfig(os.Getenv("BENCH_SERVER"))
	if err != nil {
		return err
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	p.process = exec.Command(filepath.Join(filepath.Dir(program), "integresql"))
	p.process.Env = append(os.Environ(),
		"INTEGRESQL_ADDRESS=127.0.0.1", fmt.Sprintf("INTEGRESQL_PORT=%d", port),
		"INTEGRESQL_PGHOST="+given.Host, fmt.Sprintf("INTEGRESQL_PGPORT=%d", given.Port),
		"INTEGRESQL_PGUSER="+given.User, "INTEGRESQL_LOGGER_LEVEL=error",
		"INTEGRESQL_ECHO_ENABLE_LOGGER_MIDDLEWARE=false",
		// As many ready as it may want, and one task a core.
		"INTEGRESQL_TEST_INITIAL_POOL_SIZE=8", "INTEGRESQL_TEST_MAX_POOL_SIZE=32",
	)
	if err := p.process.Start(); err != nil {
		return err
	}
	p.base = fmt.Sprintf("http://127.0.0.1:%d/api/v1/templates", port)
	p.made = map[string]bool{}
	for range 500 {
		if response, err := http.Get(p.base); err == nil {
			return response.Body.Close()
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.New("integresql has not started")
}

type integresqlAnswer struct {
	ID       int
	Database struct {
		Config struct {
			Host, Username, Password, Database string
			Port                               int
		}
	}
}

func (a integresqlAnswer) url() string {
	c := a.Database.Config
	return fmt.Sprintf("postgres://%s@%s:%d/%s?sslmode=disable", c.Username, c.Host, c.Port, c.Database)
}

func (p *integresqlPeer) call(method, path, body string) (answer integresqlAnswer, err error) {
	request, err := http.NewRequest(method, p.base+path, bytes.NewBufferString(body))
	if err != nil {
		return answer, err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return answer, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if response.StatusCode >= http.StatusBadRequest {
		return answer, fmt.Errorf("integresql: %s: %s", response.Status, text)
	}
	if err == nil && len(text) > 0 {
		err = json.Unmarshal(text, &answer)
	}
	return answer, err
}

func (p *integresqlPeer) template(content string) error {
	if p.process == nil {
		if err := p.prepare(); err != nil {
			return err
		}
	}
	if p.made[content] {
		return nil
	}
	made, err := p.call(http.MethodPost, "", fmt.Sprintf(`{"hash":%q}`, content))
	if err == nil && content == "fifty" {
		err = tables(made.url())
	}
	if err != nil {
		return err
	}
	p.made[content] = true
	_, err = p.call(http.MethodPut, "/"+content, "")
	return err
}

func (p *integresqlPeer) database(content string) (database, error) {
	one, err := p.call(http.MethodGet, "/"+content+"/tests", "")
	if err != nil {
		return database{}, err
	}
	return database{one.url(), func() error {
		// It was written to.
		_, err := p.call(http.MethodPost, fmt.Sprintf("/%s/tests/%d/recreate", content, one.ID), "")
		return err
	}}, nil
}

func (p *integresqlPeer) end() error {
	if p.process == nil {
		return nil
	}
	if err := p.process.Process.Signal(os.Interrupt); err != nil {
		return err
	}
	return p.process.Wait()
}
