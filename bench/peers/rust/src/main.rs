//! The agent for the peers in Rust: `peers PEER`. `../README.md` describes its commands.

mod client;
mod daemon;
mod embedded;
mod library;
mod server;

use std::env;
use std::io::{self, BufRead, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// The commands of a peer. The peer measures the times, since only it knows when a request begins.
trait Peer {
    /// Does everything that may be done in advance.
    async fn prepare(&mut self) -> Result<()> {
        Ok(())
    }

    /// The time from nothing to the first row of a new server.
    async fn server(&mut self) -> Result<Duration>;

    /// The same, with a server that stays; the value has the other fields of the answer.
    async fn hold(&mut self) -> Result<(Duration, Value)>;

    /// The time for `count` fresh, empty databases, used by `clients` concurrently.
    async fn sustained(&mut self, _count: usize, _clients: usize) -> Result<Duration> {
        bail!("cannot: it starts servers, and creates no databases in one server")
    }

    /// Removes everything that was started.
    async fn end(self) -> Result<()>;
}

/// A directory that the environment names.
fn directory(variable: &str) -> Result<PathBuf> {
    let path = env::var_os(variable).with_context(|| format!("{variable} is not set"))?;
    Ok(PathBuf::from(path))
}

async fn run_command(peer: &mut impl Peer, command: &str) -> Result<Value> {
    let words: Vec<&str> = command.split_whitespace().collect();
    let (taken, mut answer) = match words[..] {
        ["prepare"] => {
            peer.prepare().await?;
            return Ok(json!({}));
        }
        ["server"] => (peer.server().await?, json!({})),
        ["hold"] => peer.hold().await?,
        ["sustained", count, clients, "empty"] => {
            let taken = peer.sustained(count.parse()?, clients.parse()?).await?;
            (taken, json!({}))
        }
        ["database" | "sustained" | "suite", ..] => {
            bail!("cannot: it has one server per database, and no templates")
        }
        _ => bail!("no such command: {command}"),
    };
    answer["ms"] = json!(taken.as_secs_f64() * 1000.0);
    Ok(answer)
}

async fn serve(mut peer: impl Peer) -> Result<()> {
    // Reading blocks only this thread: the open connections have their own.
    for command in io::stdin().lock().lines() {
        let answer = match run_command(&mut peer, &command?).await {
            Ok(answer) => answer,
            Err(error) => json!({ "error": format!("{error:#}") }),
        };
        println!("{answer}");
        io::stdout().flush()?;
    }
    peer.end().await
}

#[tokio::main]
async fn main() -> Result<()> {
    match env::args().nth(1).as_deref() {
        Some("pgtemp-rust") => serve(library::Library::new()?).await,
        Some("pgtemp-rust-daemon") => serve(daemon::Daemon::new()?).await,
        Some("postgresql-embedded") => serve(embedded::Embedded::new()?).await,
        _ => bail!("usage: peers pgtemp-rust | pgtemp-rust-daemon | postgresql-embedded"),
    }
}
