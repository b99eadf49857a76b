//! Accounts, and transfers between them.

use sqlx::{migrate::Migrator, PgPool, Result};

/// The migrations, embedded when this crate is compiled.
pub static MIGRATIONS: Migrator = sqlx::migrate!();

pub async fn open(pool: &PgPool, owner: &str, balance: i64) -> Result<i64> {
    sqlx::query_scalar("INSERT INTO account (owner, balance) VALUES ($1, $2) RETURNING id")
        .bind(owner)
        .bind(balance)
        .fetch_one(pool)
        .await
}

pub async fn balance(pool: &PgPool, account: i64) -> Result<i64> {
    sqlx::query_scalar("SELECT balance FROM account WHERE id = $1")
        .bind(account)
        .fetch_one(pool)
        .await
}

/// Moves an amount: both accounts change, or neither does.
pub async fn transfer(pool: &PgPool, from: i64, to: i64, amount: i64) -> Result<()> {
    let mut transaction = pool.begin().await?;
    for (account, change) in [(to, amount), (from, -amount)] {
        sqlx::query("UPDATE account SET balance = balance + $2 WHERE id = $1")
            .bind(account)
            .bind(change)
            .execute(&mut *transaction)
            .await?;
    }
    transaction.commit().await
}
