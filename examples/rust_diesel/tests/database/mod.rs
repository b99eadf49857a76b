//! The fixture: copy this file.

use diesel::r2d2::{ConnectionManager, Pool, PooledConnection};
use diesel::PgConnection;
use diesel_migrations::MigrationHarness;

pub type PgPool = Pool<ConnectionManager<PgConnection>>;
pub type Pooled = PooledConnection<ConnectionManager<PgConnection>>;

/// Opens a pool on a database of its own: its connections name a unique session.
///
/// If the daemon has run the migrations in a template, there is no migration left to run here.
pub fn database(name: &str) -> PgPool {
    let session = format!("{name}_{}", std::process::id());
    let manager = ConnectionManager::new(format!("{}~{session}", url()));
    let pool = Pool::builder().max_size(4).build(manager).unwrap();
    migrate(&mut pool.get().unwrap());
    pool
}

pub fn migrate(connection: &mut PgConnection) {
    let done = connection.run_pending_migrations(accounts::MIGRATIONS);
    done.unwrap();
}

/// Returns DATABASE_URL unchanged: each connection to it gets a database of its own.
pub fn url() -> String {
    std::env::var("DATABASE_URL").expect("DATABASE_URL leads to pgtemp")
}
