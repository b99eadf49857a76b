//! Migrates the database that DATABASE_URL names.

use sqlx::{Connection, PgConnection};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut connection = PgConnection::connect(&std::env::var("DATABASE_URL")?).await?;
    accounts::MIGRATIONS.run(&mut connection).await?;
    Ok(connection.close().await?)
}
