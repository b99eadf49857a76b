//! The daemon of the original pgtemp: each connection gets its own server, which is removed when it closes.
//!
//! It has one server ready, and starts the next one when that is taken. `server` measures a daemon at rest, and
//! `sustained` a daemon without rest.

use std::env;
use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::sleep;

use crate::client::Session;
use crate::{Peer, directory, server};

const PATIENCE: Duration = Duration::from_secs(60);

pub struct Daemon {
    program: PathBuf,
    /// A directory that contains only its servers, so that they can be listed.
    servers: PathBuf,
    running: Option<Running>,
    held: Vec<Session>,
}

struct Running {
    child: Child,
    pid: i32,
    uri: String,
    /// Stays open: the daemon panics if it cannot write.
    _output: Lines<BufReader<ChildStdout>>,
}

impl Daemon {
    pub fn new() -> Result<Self> {
        // `cargo install --root TARGET` installs it in TARGET/bin; this agent is in TARGET/release. PATH is not
        // searched, since it may contain our own pgtemp.
        let agent = env::current_exe()?;
        let target = agent.ancestors().nth(2).context("no target directory")?;
        Ok(Self {
            program: target.join("bin").join("pgtemp"),
            servers: directory("BENCH_DATA")?.join("daemon"),
            running: None,
            held: Vec::new(),
        })
    }

    async fn start(&mut self) -> Result<()> {
        fs::create_dir_all(&self.servers)?;
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        // It accepts only the name localhost, and listens only on 127.0.0.1.
        let mut child = Command::new(&self.program)
            .arg("--data-dir-prefix")
            .arg(&self.servers)
            .arg(format!("postgresql://localhost:{port}/postgres"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{}", self.program.display()))?;
        let pid = child.id().context("no pid")?.try_into()?;
        let output = child.stdout.take().context("no output")?;
        let mut output = BufReader::new(output).lines();
        let reply = output.next_line().await?.unwrap_or_default();
        self.running = Some(Running {
            child,
            pid,
            uri: format!("postgresql://postgres:password@127.0.0.1:{port}/postgres"),
            _output: output,
        });
        ensure!(
            reply.starts_with("starting pgtemp server"),
            "the daemon printed: {reply}"
        );
        Ok(())
    }

    /// The daemon at rest: it runs, all held servers are in use and the next one is ready.
    async fn at_rest(&mut self) -> Result<&Running> {
        if self.running.is_none() {
            self.start().await?;
        }
        let begun = Instant::now();
        loop {
            let directories = self.directories()?;
            if directories.len() == self.held.len() + 1
                && directories
                    .iter()
                    .all(|place| server::is_ready(&place.join("pg_data_dir")))
            {
                break;
            }
            ensure!(
                begun.elapsed() < PATIENCE,
                "the daemon does not come to rest"
            );
            self.check()?;
            sleep(Duration::from_millis(5)).await;
        }
        // The daemon waits 100 ms before it hands out a server.
        sleep(Duration::from_millis(150)).await;
        self.check()
    }

    fn check(&mut self) -> Result<&Running> {
        let running = self
            .running
            .as_mut()
            .context("the daemon was not started")?;
        if let Some(status) = running.child.try_wait()? {
            bail!("the daemon exited: {status}");
        }
        Ok(running)
    }

    /// The directories of its servers, one each; they exist from before `initdb` until the server has exited.
    fn directories(&self) -> Result<Vec<PathBuf>> {
        let mut directories = Vec::new();
        for entry in fs::read_dir(&self.servers)? {
            directories.push(entry?.path());
        }
        Ok(directories)
    }
}

impl Peer for Daemon {
    async fn prepare(&mut self) -> Result<()> {
        self.at_rest().await?;
        Ok(())
    }

    async fn server(&mut self) -> Result<Duration> {
        let uri = self.at_rest().await?.uri.clone();
        let begun = Instant::now();
        let session = Session::first_row(&uri).await?;
        let taken = begun.elapsed();
        session.close().await;
        self.at_rest().await?;
        Ok(taken)
    }

    async fn hold(&mut self) -> Result<(Duration, Value)> {
        let uri = self.at_rest().await?.uri.clone();
        let begun = Instant::now();
        let session = Session::first_row(&uri).await?;
        let taken = begun.elapsed();
        let row = session.client.query_one("SHOW data_directory", &[]).await?;
        let data_dir = PathBuf::from(row.get::<_, String>(0));
        self.held.push(session);
        let daemon = self.at_rest().await?.pid;
        // The server that is ready also belongs to the daemon.
        let reply = json!({
            "pid": server::postmaster(&data_dir)?,
            "directories": self.directories()?,
            "daemon": daemon,
        });
        Ok((taken, reply))
    }

    async fn sustained(&mut self, count: usize, clients: usize) -> Result<Duration> {
        let uri = self.at_rest().await?.uri.clone();
        let taken = Arc::new(AtomicUsize::new(0));
        let begun = Instant::now();
        let mut tasks = Vec::new();
        for _ in 0..clients {
            let (uri, taken) = (uri.clone(), Arc::clone(&taken));
            tasks.push(tokio::spawn(async move {
                while taken.fetch_add(1, Ordering::Relaxed) < count {
                    Session::first_row(&uri).await?.close().await;
                }
                anyhow::Ok(())
            }));
        }
        for task in tasks {
            task.await??;
        }
        // All are closed when only the server that is ready exists.
        while self.directories()?.len() > self.held.len() + 1 {
            ensure!(begun.elapsed() < PATIENCE * 10, "servers stay");
            sleep(Duration::from_millis(2)).await;
        }
        let taken = begun.elapsed();
        self.at_rest().await?;
        Ok(taken)
    }

    async fn end(self) -> Result<()> {
        for session in self.held {
            session.close().await;
        }
        if let Some(mut running) = self.running {
            // The leftovers of a killed daemon stay, so that they can be inspected.
            if running.child.try_wait()?.is_none() {
                kill(Pid::from_raw(running.pid), Signal::SIGINT)?;
                running.child.wait().await?;
                fs::remove_dir(&self.servers)?;
            }
        }
        Ok(())
    }
}
