//! The fixture: copy this file.

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::Connection;

/// Opens a pool on a database of its own: its connections name a unique session.
///
/// If the daemon has run the migrations in a template, there is no migration left to run here.
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

/// Opens one connection, with a database of its own.
pub async fn connection() -> PgConnection {
    let mut connection = PgConnection::connect_with(&options()).await.unwrap();
    accounts::MIGRATIONS.run(&mut connection).await.unwrap();
    connection
}

/// Returns the connection options of DATABASE_URL.
pub fn options() -> PgConnectOptions {
    let url = std::env::var("DATABASE_URL").expect("DATABASE_URL leads to pgtemp");
    url.parse().unwrap()
}
