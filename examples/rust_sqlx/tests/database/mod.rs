//! The fixture: copy this file.

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::Connection;

/// A pool on a database of its own: its connections name a session that nobody else names.
///
/// Where the daemon has the migrations as a template, there is nothing left to be run here.
pub async fn database(name: &str) -> PgPool {
    let session = format!("{name}_{}", std::process::id());
    let template = options().get_database().unwrap_or("test").to_owned();
    let pool = PgPoolOptions::new()
        .max_connections(4)
        .connect_with(options().database(&format!("{template}~{session}")))
        .await
        .unwrap();
    accounts::MIGRATIONS.run(&pool).await.unwrap();
    pool
}

/// One connection, with a database of its own.
pub async fn connection() -> PgConnection {
    let mut connection = PgConnection::connect_with(&options()).await.unwrap();
    accounts::MIGRATIONS.run(&mut connection).await.unwrap();
    connection
}

/// What DATABASE_URL says.
pub fn options() -> PgConnectOptions {
    let url = std::env::var("DATABASE_URL").expect("DATABASE_URL leads to pgtemp");
    url.parse().unwrap()
}
