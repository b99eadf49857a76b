package main

import (
	"bytes"
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
)

// integresqlPeer runs its server and uses it over HTTP, like clients in every language.
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
		// More than its default, which is the number of cores: 16 clients have one database each. It runs
		// one task per core.
		"INTEGRESQL_TEST_INITIAL_POOL_SIZE=8", "INTEGRESQL_TEST_MAX_POOL_SIZE=32",
	)
	if err := p.process.Start(); err != nil {
		return err
	}
	p.base = fmt.Sprintf("http://127.0.0.1:%d/api/v1", port)
	p.made = map[string]bool{}
	for range 500 {
		if response, err := http.Get(p.base + "/templates"); err == nil {
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
	made, err := p.call(http.MethodPost, "/templates", fmt.Sprintf(`{"hash":%q}`, content))
	if err == nil && content == "fifty" {
		err = tables(made.url())
	}
	if err != nil {
		return err
	}
	p.made[content] = true
	_, err = p.call(http.MethodPut, "/templates/"+content, "")
	return err
}

func (p *integresqlPeer) database(content string) (database, error) {
	one, err := p.call(http.MethodGet, "/templates/"+content+"/tests", "")
	if err != nil {
		return database{}, err
	}
	return database{one.url(), func() error {
		// The database was written to.
		_, err := p.call(http.MethodPost, fmt.Sprintf("/templates/%s/tests/%d/recreate", content, one.ID), "")
		return err
	}}, nil
}

// settle waits for the databases that it recreates in the background after its answer.
func (p *integresqlPeer) settle(content string) (time.Duration, error) {
	return standstill(os.Getenv("BENCH_SERVER"), "integresql_test_"+content+"_%")
}

func (p *integresqlPeer) end() error {
	if p.process == nil {
		return nil
	}
	// Other peers use the same server.
	if _, err := p.call(http.MethodDelete, "/admin/templates", ""); err != nil {
		return err
	}
	if err := p.process.Process.Signal(os.Interrupt); err != nil {
		return err
	}
	return p.process.Wait()
}
