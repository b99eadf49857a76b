#!/usr/bin/env bash
# Runs PostgreSQL's own programs with the daemon of DATABASE_URL and checks the result of each.
# Prints one line per check (TAP); the exit status is 0 if all checks are ok. See README.md.
set -euo pipefail
set -m # background jobs receive SIGINT (Ctrl-C), as in a terminal
: "${DATABASE_URL:?does not lead to a daemon: see README.md}"
EMPTY=${DATABASE_URL%/*}/empty # this name has no template, so the database is empty
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
checks=0 failed=0

# session URL: prints the URL of a new, unique session.
session() {
    echo "$1~$$_$RANDOM$RANDOM"
}

# ask URL QUERY: prints only the rows.
ask() {
    psql -X -At -v ON_ERROR_STOP=1 "$1" -c "$2"
}

# check WHAT GOT WANT: prints whether GOT equals WANT.
check() {
    checks=$((checks + 1))
    if [ "$2" = "$3" ]; then
        echo "ok $checks - $1"
    else
        echo "not ok $checks - $1: got '$2', want '$3'"
        failed=1
    fi
}

# interrupt PID URL CONDITION: sends Ctrl-C to PID as soon as one backend of the database fulfils
# CONDITION on pg_stat_activity.
interrupt() {
    local end=$((SECONDS + 60))
    until [ "$(ask "$2" "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND $3")" = 1 ]; do
        [ $SECONDS -lt $end ] || return 1
    done
    kill -INT "$1"
    wait "$1" || true
}

# contents URL: prints the contents of a database as SQL, without the random key of \restrict
# that newer versions of pg_dump add.
contents() {
    pg_dump "$1" | sed -E '/^\\(un)?restrict /d'
}

# A single connection has a database of its own.
check "pg_isready" "$(pg_isready -q -d "$DATABASE_URL" && echo yes)" yes
ask "$DATABASE_URL" "CREATE TABLE mine (n int)" >"$WORK/out"
query="SELECT to_regclass('mine') IS NULL, count(*) FROM account"
check "psql: the next one sees nothing of it" "$(ask "$DATABASE_URL" "$query")" "t|1000"
pg_dump "$DATABASE_URL" >"$WORK/app.sql"
load=$(psql -X -q -At -1 -v ON_ERROR_STOP=1 "$EMPTY" -f "$WORK/app.sql" -c "SELECT sum(balance) FROM public.account")
check "pg_dump: the template, and psql loads it" "$(tail -n 1 <<<"$load")" 100000

# Several connections share the database of a session.
bench=$(session "$DATABASE_URL")
other=$(session "$DATABASE_URL")
pgbench -i -q "$bench" 2>"$WORK/err"
check "pgbench -i: its tables are there" "$(ask "$bench" "SELECT count(*) FROM pgbench_accounts")" 100000
said=$(pgbench -c 4 -j 2 -t 25 "$bench" 2>"$WORK/err")
check "pgbench -c 4: all transactions" "$(grep -o '[0-9]*/[0-9]*$' <<<"$said")" 100/100
query="SELECT count(*), sum(delta) = (SELECT sum(abalance) FROM pgbench_accounts) FROM pgbench_history"
check "pgbench -c 4: nothing is lost" "$(ask "$bench" "$query")" "100|t"
query="SELECT to_regclass('pgbench_accounts') IS NULL"
check "psql: another session sees nothing of it" "$(ask "$other" "$query")" t
pg_dump -j 4 -Fd -f "$WORK/dump" "$bench"
restored=$(session "$EMPTY")
pg_restore -j 4 --exit-on-error -d "$restored" "$WORK/dump"
check "pg_dump -j 4, pg_restore -j 4: the same" "$(contents "$restored" | md5sum)" "$(contents "$bench" | md5sum)"

# Ctrl-C sends a cancel request, which the daemon passes to the server that runs the statement.
asleep="wait_event = 'PgSleep'"
psql -X "$bench" -c "SELECT pg_sleep(600)" >"$WORK/out" 2>"$WORK/err" &
interrupt $! "$bench" "$asleep"
check "psql: cancelled" "$(grep -c "canceling statement due to user request" "$WORK/err")" 1
check "psql: the statement has ended" "$(ask "$bench" "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND $asleep")" 0
pgbench -i -q -s 500 "$other" >"$WORK/out" 2>"$WORK/err" &
interrupt $! "$other" "query LIKE 'copy pgbench_accounts%'"
check "pgbench -i: cancelled" "$(grep -c "canceling statement due to user request" "$WORK/err")" 1
check "pgbench -i: what it had loaded is undone" "$(ask "$other" "SELECT count(*) FROM pgbench_accounts")" 0

# Errors are those of PostgreSQL.
said=$(psql -X -At "$DATABASE_URL" -c "INSERT INTO account VALUES (1, 5)" -c '\echo :LAST_ERROR_SQLSTATE' 2>"$WORK/err")
check "psql: an error keeps its SQLSTATE" "$said" 23505
pgbench -i -q "$other" 2>"$WORK/err"
echo "UPDATE account SET balance = -1" >"$WORK/overdraw.sql"
pgbench -n -f "$WORK/overdraw.sql" -t 1 "$other" >"$WORK/out" 2>"$WORK/err" || status=$?
check "pgbench: an error ends it" "${status:-0} $(grep -c 'not_overdrawn' "$WORK/err")" "2 1"

echo "1..$checks"
exit $failed
