//! Migrates the database that DATABASE_URL names.

use diesel::{Connection, PgConnection};
use diesel_migrations::MigrationHarness;

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut connection = PgConnection::establish(&std::env::var("DATABASE_URL")?)?;
    connection.run_pending_migrations(accounts::MIGRATIONS)?;
    Ok(())
}
