//! The original pgtemp as a library: a server for each test.
//!
//! Its defaults are its fastest settings: `initdb -N`, and a server without `fsync`, `synchronous_commit`,
//! `full_page_writes` and autovacuum. Its database is `postgres`, so it needs no `createdb`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pgtemp::{PgTempDB, PgTempDBBuilder};
use serde_json::{Value, json};

use crate::client::Session;
use crate::{Peer, directory, server};

pub struct Library {
    bin: PathBuf,
    place: PathBuf,
    held: Vec<(PgTempDB, Session)>,
}

impl Library {
    pub fn new() -> Result<Self> {
        Ok(Self {
            bin: directory("BENCH_BIN")?,
            place: directory("BENCH_DATA")?,
            held: Vec::new(),
        })
    }

    async fn start(&self) -> Result<(Duration, PgTempDB, Session)> {
        let begun = Instant::now();
        let builder = PgTempDBBuilder::new()
            .with_bin_path(&self.bin)
            .with_data_dir_prefix(&self.place);
        // It panics if it cannot start. In a separate task that is an error.
        let db = tokio::spawn(builder.start_async()).await?;
        let session = Session::first_row(&db.connection_uri()).await?;
        Ok((begun.elapsed(), db, session))
    }
}

/// Stops a server and removes its directory; the library blocks during that.
async fn stop(db: PgTempDB, session: Session) -> Result<()> {
    session.close().await;
    Ok(tokio::task::spawn_blocking(|| db.shutdown()).await?)
}

impl Peer for Library {
    async fn server(&mut self) -> Result<Duration> {
        let (taken, db, session) = self.start().await?;
        stop(db, session).await?;
        Ok(taken)
    }

    async fn hold(&mut self) -> Result<(Duration, Value)> {
        let (taken, db, session) = self.start().await?;
        let data_dir = db.data_dir();
        let place = data_dir.parent().context("a directory without parent")?;
        let answer = json!({"pid": server::postmaster(&data_dir)?, "directories": [place]});
        self.held.push((db, session));
        Ok((taken, answer))
    }

    async fn end(self) -> Result<()> {
        for (db, session) in self.held {
            stop(db, session).await?;
        }
        Ok(())
    }
}
