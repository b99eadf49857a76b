//! postgresql_embedded: a server for each test.
//!
//! By default it downloads PostgreSQL once and stores it. The download is not measured, so it is configured to use
//! installed programs (`trust_installation_dir`); afterwards both cases are the same.

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
            // The value of its own benchmark: the default of 5 s suits an `initdb` on an idle machine.
            .timeout(Some(Duration::from_secs(30)))
            .build();
        let mut postgresql = PostgreSQL::new(settings);
        postgresql.setup().await?;
        postgresql.start().await?;
        // The unused database of the new server: `create_database` would only take time.
        let uri = postgresql.settings().url("postgres");
        let session = Session::first_row(&uri).await?;
        Ok((begun.elapsed(), postgresql, session))
    }
}

/// Stops a server. Its directory is removed when its value is dropped.
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
        let answer = json!({
            "pid": server::postmaster(&settings.data_dir)?,
            "directories": [&settings.data_dir, settings.password_file.parent().unwrap_or(Path::new("/"))],
        });
        self.held.push((postgresql, session));
        Ok((taken, answer))
    }

    async fn end(self) -> Result<()> {
        for (postgresql, session) in self.held {
            stop(postgresql, session).await?;
        }
        Ok(())
    }
}
