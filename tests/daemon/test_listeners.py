"""How clients connect: TLS, passwords and addresses, and which clients are refused."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import ssl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import psycopg
import pytest
import trustme

from pgtemp.wire.messages import SSL_CODE, startup_message, untyped
from pgtemp.wire.tls import ALPN
from support import Daemon, eventually, run_pgtemp

PASSWORD = "open sesame, ğ"
HELLO = startup_message({"user": "postgres", "database": "test"})
FORMS = ["sslnegotiation=postgres", "sslnegotiation=direct"]


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(f"{PASSWORD}\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def certified(tmp_path: Path) -> list[str]:
    """Options for a localhost certificate; its issuer is in `root.crt` of the same directory."""
    authority = trustme.CA()
    made = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(tmp_path / "root.crt")
    made.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    made.private_key_pem.write_to_path(tmp_path / "key.pem")
    return ["--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")]


def connect(served: Daemon, **more: str) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(served.uri, **more)  # type: ignore[arg-type]


def socket_of(served: Daemon) -> str:
    return served.output[-1].partition("socket is in ")[2].partition(";")[0]


# TLS


@pytest.mark.parametrize("form", FORMS)
def test_tls_with_a_certificate(
    daemon: type[Daemon], certified: list[str], tmp_path: Path, form: str
) -> None:
    """libpq verifies it in full.

    Clients without TLS connect as well, and the unix socket has no TLS.
    """
    served = daemon(*certified)
    checked = f"{served.uri}?sslmode=verify-full&sslrootcert={tmp_path}/root.crt&{form}"
    with psycopg.connect(checked) as connection:
        assert connection.pgconn.ssl_in_use
        data = os.urandom(1 << 20) * 8
        digest = connection.execute("SELECT sha256(%b), %b", [data, data]).fetchone()
        assert digest == (hashlib.sha256(data).digest(), data)
    with connect(served, sslmode="disable") as connection:
        assert not connection.pgconn.ssl_in_use
    with connect(served, host=socket_of(served), sslmode="prefer") as connection:
        assert not connection.pgconn.ssl_in_use


def test_a_generated_tls_certificate(daemon: type[Daemon]) -> None:
    """The daemon generates a certificate and a root file that verifies it; other roots do not."""
    served = daemon("--tls", "auto")
    root = served.output[-2].partition("sslrootcert=")[2].strip()
    with connect(served, sslmode="verify-full", sslrootcert=root) as connection:
        assert connection.pgconn.ssl_in_use
    with pytest.raises(psycopg.OperationalError, match="certificate"):
        connect(served, sslmode="verify-full", sslrootcert="system")
    assert served.end() == (0, "")
    assert not Path(root).exists()


def test_tls_with_asyncpg(daemon: type[Daemon], certified: list[str], tmp_path: Path) -> None:
    """asyncpg uses TLS and cancels a query; the cancel is complete when asyncpg returns."""
    served = daemon(*certified)
    context = ssl.create_default_context(cafile=tmp_path / "root.crt")

    async def use() -> None:
        connection = await asyncpg.connect(served.uri, ssl=context)
        with pytest.raises(asyncio.TimeoutError):
            await connection.fetchval("SELECT pg_sleep(60)", timeout=0.3)
        assert await connection.fetchval("SELECT ssl FROM pg_stat_ssl LIMIT 1") is False
        await connection.close()

    asyncio.run(use())


@pytest.mark.parametrize("form", FORMS)
def test_cancel_under_tls(daemon: type[Daemon], form: str) -> None:
    """libpq encrypts it, too, and reports a connection that just closes as an error."""
    served = daemon("--tls", "auto")
    with psycopg.connect(f"{served.uri}?sslmode=require&{form}") as one:
        pid = one.info.backend_pid
        with ThreadPoolExecutor(1) as thread:
            asleep = thread.submit(one.execute, "SELECT pg_sleep(60)")
            assert eventually(lambda: b"SELECT" in Path(f"/proc/{pid}/cmdline").read_bytes())
            one.cancel_safe()
            with pytest.raises(psycopg.errors.QueryCanceled):
                asleep.result(30)


def test_copy_through_tls_with_a_slow_reader(daemon: type[Daemon]) -> None:
    served = daemon("--tls", "auto")
    with connect(served, sslmode="require") as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE t (n int)")
        with cursor.copy("COPY t FROM STDIN") as copy:
            for n in range(0, 200_000, 1000):
                copy.write("".join(f"{i}\n" for i in range(n, n + 1000)))
        with cursor.copy("COPY t TO STDOUT") as copy:
            assert b"".join(bytes(part) for part in copy) == b"".join(
                b"%d\n" % n for n in range(200_000)
            )


def test_half_close_under_tls(daemon: type[Daemon], certified: list[str], tmp_path: Path) -> None:
    """A client that sends close_notify still gets its answer."""
    served = daemon(*certified)
    context = ssl.create_default_context(cafile=tmp_path / "root.crt")
    context.set_alpn_protocols([ALPN])
    query = b"SELECT 'the answer'\0"
    arrived, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(arrived, to_send, server_hostname="localhost")
    received = b""
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.settimeout(30)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                client.sendall(to_send.read())
                arrived.write(client.recv(65536))
        tls.write(HELLO + b"Q" + (len(query) + 4).to_bytes(4, "big") + query)
        with pytest.raises(ssl.SSLWantReadError):
            tls.unwrap()  # close_notify
        client.sendall(to_send.read())
        while data := client.recv(65536):
            arrived.write(data)
        try:
            while part := tls.read(65536):
                received += part
        except (ssl.SSLZeroReturnError, ssl.SSLWantReadError):
            pass
    assert b"the answer" in received


def test_direct_tls_requires_alpn(
    daemon: type[Daemon], certified: list[str], tmp_path: Path
) -> None:
    """PostgreSQL also refuses it without ALPN. It uses no lease, and other clients are served."""
    served = daemon(*certified, "--log-level", "info")
    context = ssl.create_default_context(cafile=tmp_path / "root.crt")
    with (
        socket.create_connection(("127.0.0.1", served.port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as client,
    ):
        client.settimeout(30)
        assert client.recv(1) == b""
    with connect(served, sslmode="require"):
        pass
    _, errors = served.end()
    assert "without the application protocol" in errors and "lease 2:" not in errors


def test_direct_tls_without_a_certificate(daemon: type[Daemon]) -> None:
    """The client gets a TLS alert, not just an end of file."""
    served = daemon("--pool", "0")
    with pytest.raises(psycopg.OperationalError, match="handshake failure"):
        connect(served, sslmode="require", sslnegotiation="direct")
    with pytest.raises(psycopg.OperationalError, match="server does not support SSL"):
        connect(served, sslmode="require")


def test_plain_text_after_the_request_for_tls(daemon: type[Daemon], certified: list[str]) -> None:
    served = daemon(*certified, "--pool", "0", "--log-level", "info")
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.settimeout(30)
        client.sendall(untyped(SSL_CODE))
        assert client.recv(1) == b"S"
        client.sendall(HELLO)  # in the clear
        while client.recv(1024):
            pass
    status, errors = served.end()
    assert status == 0 and "TLS: " in errors and "Traceback" not in errors


# passwords


@pytest.mark.parametrize(
    "arguments",
    [[], ["--isolation", "cluster"], ["--single"]],
    ids=["database", "cluster", "single"],
)
def test_every_client_needs_the_password(
    daemon: type[Daemon], password_file: Path, arguments: list[str]
) -> None:
    """It does not depend on the user name. PostgreSQL itself requires SCRAM for each connection."""
    served = daemon("--password-file", str(password_file), *arguments)
    for user in ("postgres", "somebody"):
        for _ in range(3):  # even if the daemon knows such clients
            with connect(served, user=user, password=PASSWORD, require_auth="scram-sha-256") as one:
                assert one.execute("SELECT current_user").fetchone() == (user,)
            with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                connect(served, user=user, password="guess")
            with pytest.raises(psycopg.OperationalError, match="no password supplied"):
                connect(served, user=user)
    with pytest.raises(psycopg.OperationalError, match="channel binding"):
        connect(served, password=PASSWORD, channel_binding="require")


def test_the_password_for_sessions_and_templates(
    daemon: type[Daemon], password_file: Path, tmp_path: Path
) -> None:
    """A role that a template creates with its own password keeps that password."""
    schema = tmp_path / "schema.sql"
    schema.write_text(
        "CREATE ROLE clerk LOGIN PASSWORD 'own'; CREATE ROLE guest LOGIN; CREATE TABLE t (n int);"
    )
    served = daemon("--password-file", str(password_file), "--template", f"app={schema}")
    with connect(served, password=PASSWORD, dbname="app~template") as connection:
        connection.execute("INSERT INTO t VALUES (1)")
    for user, password in (("clerk", "own"), ("guest", PASSWORD), ("postgres", PASSWORD)):
        with connect(served, user=user, password=password, dbname="app~one") as connection:
            assert connection.execute("SELECT current_user").fetchone() == (user,)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        connect(served, user="clerk", password=PASSWORD, dbname="app~one")
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        connect(served, dbname="app~template")


def test_the_password_over_tls(daemon: type[Daemon], password_file: Path) -> None:
    """Password and TLS work together. The socket's directory replaces the password."""
    served = daemon("--password-file", str(password_file), "--tls", "auto")
    with connect(served, password=PASSWORD, sslmode="require") as connection:
        assert connection.pgconn.ssl_in_use
    with connect(served, host=socket_of(served)) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_another_local_user_without_the_password(
    daemon: type[Daemon], password_file: Path, other_user: str
) -> None:
    """Another user can connect nowhere, cannot find the password, and is admitted with it."""
    served = daemon("--password-file", str(password_file), "--log-level", "debug", "--tls", "auto")
    with connect(served, password=PASSWORD) as connection:
        row = connection.execute("SHOW port").fetchone()
        assert row is not None
        own_port = str(row[0])
        home = Path(str(connection.execute("SHOW data_directory").fetchone()[0])).parent  # type: ignore[index]

        def psql(host: str, port: str, **env: str) -> subprocess.CompletedProcess[str]:
            return as_user(
                other_user, "psql", "-wXAt", "-h", host, "-p", port, "-U", "postgres",
                "-c", "SELECT 'inside'", "test", **env,
            )  # fmt: skip

        for host, port in (
            ("127.0.0.1", str(served.port)),
            ("127.0.0.1", own_port),  # of the server itself
            (socket_of(served), str(served.port)),
            (str(home), own_port),
        ):
            for env in ({}, {"PGPASSWORD": "guess"}):
                refused = psql(host, port, **env)
                assert refused.returncode == 2 and "inside" not in refused.stdout, refused
        assert psql("127.0.0.1", str(served.port), PGPASSWORD=PASSWORD).stdout == "inside\n"
        seen = as_user(
            other_user, "sh", "-c",
            'cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ "$@" 2>/dev/null; true',
            "sh", str(password_file), f"{home}/log", f"{socket_of(served)}/root.crt",
        )  # fmt: skip
        assert "pgtemp" in seen.stdout and "sesame" not in seen.stdout
        log = "".join(path.read_text() for path in home.glob("*log*"))
        assert "sesame" not in log
    _, errors = served.end()
    assert "sesame" not in errors and "sesame" not in "".join(served.output)


def as_user(user: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program as another user."""
    return subprocess.run(
        argv, user=user, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False, env={"PATH": os.environ["PATH"], **env}, errors="replace",
    )  # fmt: skip


# addresses


def test_a_password_is_required_on_every_address(daemon: type[Daemon], password_file: Path) -> None:
    """The daemon listens on every address; the one used here is not localhost's."""
    served = daemon("--listen", "*", "--password-file", str(password_file))
    with connect(served, host="127.0.0.9", password=PASSWORD) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        connect(served, host="127.0.0.9")
    assert "localhost" in served.output[1]


def test_another_loopback_address_needs_no_password(daemon: type[Daemon]) -> None:
    served = daemon("--listen", "127.0.0.9")
    assert "127.0.0.9" in served.output[1]
    with psycopg.connect(served.output[1].strip()) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    with pytest.raises(psycopg.OperationalError):
        connect(served, host="127.0.0.1")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--listen", "*"], "without a password"),
        (["--listen", "0.0.0.0"], "without a password"),
        (["--listen", "192.0.2.1"], "without a password"),
        (["--listen", "no.such.name.invalid"], "not an address"),
        (["--listen", "192.0.2.1", "--password-file", "{good}"], "192.0.2.1"),
        (["--password-file", "/nowhere"], "/nowhere"),
        (["--password-file", "{empty}"], "is no password"),
        (["--password-file", "{binary}"], "not UTF-8"),
        (["--password-file", "{good}", "--pg-hba-conf", "{empty}"], "pg_hba.conf"),
        (["--password-file", "{good}", "--no-tcp"], "without TCP"),
        (["--tls", "yes"], "yes"),
        (["--tls", "auto", "--tls-cert", "{good}"], "--tls auto"),
        (["--tls-key", "{good}"], "--tls-key was given without a certificate"),
        (["--tls-cert", "{good}"], "cannot be used for TLS"),
        (["--tls-cert", "{cert}"], "cannot be used for TLS"),
        (["--tls-cert", "{cert}", "--tls-key", "{other}"], "cannot be used for TLS"),
        (["--tls-cert", "{cert}", "--tls-key", "{locked}"], "passphrase"),
    ],
)
def test_invalid_listener_options(tmp_path: Path, arguments: list[str], word: str) -> None:
    """The error is one line with a remedy, and nothing has been started."""
    authority = trustme.CA()
    made, other = authority.issue_cert("localhost"), authority.issue_cert("localhost")
    files = {
        name: tmp_path / name for name in ("good", "empty", "binary", "cert", "other", "locked")
    }
    files["good"].write_text("geheim\n")
    files["empty"].write_text("\n")
    files["binary"].write_bytes(b"\xff\n")
    made.cert_chain_pems[0].write_to_path(files["cert"])
    other.private_key_pem.write_to_path(files["other"])
    subprocess.run(
        ["openssl", "pkey", "-in", files["other"], "-aes128", "-passout", "pass:x",
         "-out", files["locked"]], check=True,
    )  # fmt: skip
    for path in files.values():
        path.chmod(0o600)
    result = run_pgtemp(*(word.format(**files) for word in arguments))
    assert result.returncode == 2, result
    assert word in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.startswith("pgtemp: ") and result.stderr.count("\n") == 1
    assert ";" in result.stderr


def test_a_uri_with_a_different_password_is_refused(password_file: Path) -> None:
    result = run_pgtemp(
        "--password-file", str(password_file), "postgresql://me:other@localhost:6599/x"
    )
    assert result.returncode == 2 and "a different password" in result.stderr
    assert "other@" not in result.stderr and "sesame" not in result.stderr


def test_a_password_file_that_others_can_read(daemon: type[Daemon], password_file: Path) -> None:
    password_file.chmod(0o644)
    served = daemon("--password-file", str(password_file))
    _, errors = served.end()
    assert "chmod 600" in errors


# before a client has authenticated


@pytest.mark.parametrize("hurry", [False, True], ids=["waits", "leaves at once"])
def test_a_client_without_the_password_uses_no_database(
    daemon: type[Daemon], password_file: Path, tmp_path: Path, hurry: bool
) -> None:
    """Messages that it sends instead of the password cause no dump and no changed template."""
    served = daemon(
        "--password-file", str(password_file), "--dump", str(tmp_path / "out.sql"),
        "--log-level", "info",
    )  # fmt: skip
    for dbname in ("test", "test~template"):
        hello = startup_message({"user": "postgres", "database": dbname})
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.settimeout(30)
            client.sendall(hello + b"Q\0\0\0\x0dSELECT 1\0")
            while not hurry and client.recv(1024):
                pass
    with connect(served, password=PASSWORD) as connection:
        connection.execute("SELECT 1")
    status, errors = served.end()
    assert status == 0 and errors.count("used True") == 1, errors
    assert len(list(tmp_path.glob("out*"))) == 1


@pytest.mark.parametrize("shared", [True, False])
def test_a_lease_that_disables_the_password(
    daemon: type[Daemon], password_file: Path, shared: bool
) -> None:
    """A pg_hba.conf that a client wrote in a lease admits no client of the daemon."""
    isolation = [] if shared else ["--isolation", "cluster"]
    served = daemon("--password-file", str(password_file), *isolation)
    dbname = "test" if shared else "test~one"
    with connect(served, password=PASSWORD, dbname=dbname, autocommit=True) as connection:
        connection.execute("COPY (SELECT 'host all all all trust') TO PROGRAM 'cat > pg_hba.conf'")
        connection.execute("SELECT pg_reload_conf()")

        def is_refused() -> bool:
            """The server may not have read the file yet."""
            with pytest.raises(psycopg.OperationalError) as caught:
                connect(served, dbname=dbname)
            return "does not ask for the password" in str(caught.value)

        assert eventually(is_refused)
        # the next client gets a new server, if it is not in the session
        assert is_refused() is not shared
    for _ in range(2):
        with connect(served, password=PASSWORD, dbname="test") as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_password_through_a_named_pipe(daemon: type[Daemon], tmp_path: Path) -> None:
    """The daemon reads the pipe once, without its child processes.

    SIGTERM stops a daemon that waits for it.
    """
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(pipe.write_text, f"{PASSWORD}\n")
        served = daemon("--password-file", str(pipe))
    with connect(served, password=PASSWORD) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    command = [sys.executable, "-m", "pgtemp", "--password-file", str(pipe)]
    waiting = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with open(pipe, "w"):  # the daemon reads from here on
            waiting.terminate()
            assert waiting.wait(30) == -signal.SIGTERM
    finally:
        waiting.kill()
        waiting.wait()
