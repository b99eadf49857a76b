//! postgresql_embedded: a server for each test.
//!
//! By default it downloads PostgreSQL once and keeps it. That is not what is measured, so it is told to take
//! programs that are installed (`trust_installation_dir`), which from then on is the same to it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use postgresql_embedded::{PostgreSQL, SettingsBuilder};
use serde_json::{Value, json};

use crate::client::Session;
use crate::{Peer, directory, server};

pub struct Embedded {
    installation: PathBuf,
    held: Vec<(PostgreSQL, Session)>,
}

impl Embedded {
    pub fn new() -> Result<Self> {
        let bin = directory("BENCH_BIN")?;
        let installation = bin.parent().context("BENCH_BIN is in nothing")?;
        Ok(Self {
            installation: installation.to_path_buf(),
            held: Vec::new(),
        })
    }

    async fn start(&self) -> Result<(Duration, PostgreSQL, Session)> {
        let begun = Instant::now();
        let settings = SettingsBuilder::new()
            .installation_dir(&self.installation)
            .trust_installation_dir(true)
            // Its own benchmark has this one: the 5 s of the default are for an `initdb` on an idle machine.
            .timeout(Some(Duration::from_secs(30)))
            .build();
        let mut postgresql = PostgreSQL::new(settings);
        postgresql.setup().await?;
        postgresql.start().await?;
        // The database of the new server, which nobody has used: `create_database` would only cost time.
        let uri = postgresql.settings().url("postgres");
        let session = Session::first_row(&uri).await?;
        Ok((begun.elapsed(), postgresql, session))
    }
}

/// Stops a server. Its directory is removed with the value that stands for it.
async fn stop(postgresql: PostgreSQL, session: Session) -> Result<()> {
    session.close().await;
    Ok(postgresql.stop().await?)
}

impl Peer for Embedded {
    async fn server(&mut self) -> Result<Duration> {
        let (taken, postgresql, session) = self.start().await?;
        stop(postgresql, session).await?;
        Ok(taken)
    }

    async fn hold(&mut self) -> Result<(Duration, Value)> {
        let (taken, postgresql, session) = self.start().await?;
        let settings = postgresql.settings();
        let said = json!({
            "pid": server::postmaster(&settings.data_dir)?,
            "places": [&settings.data_dir, settings.password_file.parent().unwrap_or(Path::new("/"))],
        });
        self.held.push((postgresql, session));
        Ok((taken, said))
    }

    async fn end(self) -> Result<()> {
        for (postgresql, session) in self.held {
            stop(postgresql, session).await?;
        }
        Ok(())
    }
}
