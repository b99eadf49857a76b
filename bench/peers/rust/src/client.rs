//! A connection of the driver, and the first row that it returns.

use std::error::Error as _;
use std::io;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls};

const PATIENCE: Duration = Duration::from_secs(20);

pub struct Session {
    pub client: Client,
    driver: JoinHandle<Result<(), tokio_postgres::Error>>,
}

impl Session {
    /// Connects and requests one row, and repeats that while the server is starting: the original pgtemp
    /// reports a start after a fixed time, even if the server does not answer yet.
    pub async fn first_row(uri: &str) -> Result<Self> {
        let begun = Instant::now();
        loop {
            match Self::try_first_row(uri).await {
                Err(error) if on_its_way(&error) && begun.elapsed() < PATIENCE => {
                    sleep(Duration::from_millis(1)).await;
                }
                Err(error) => return Err(error.into()),
                Ok((session, row)) => {
                    ensure!(row == 1, "SELECT 1 gave {row}");
                    return Ok(session);
                }
            }
        }
    }

    async fn try_first_row(uri: &str) -> Result<(Self, i32), tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::connect(uri, NoTls).await?;
        let driver = tokio::spawn(connection);
        let row = client.query_one("SELECT 1", &[]).await?.get(0);
        Ok((Self { client, driver }, row))
    }

    /// Sends Terminate, and waits until the socket is closed.
    pub async fn close(self) {
        drop(self.client);
        let _ = self.driver.await;
    }
}

fn on_its_way(error: &tokio_postgres::Error) -> bool {
    error.code() == Some(&SqlState::CANNOT_CONNECT_NOW)
        || error.source().is_some_and(|cause| cause.is::<io::Error>())
}
