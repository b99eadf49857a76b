//! Accounts, and transfers between them.

pub mod schema;

use diesel::prelude::*;
use diesel_migrations::{embed_migrations, EmbeddedMigrations};
use schema::account::dsl::{account, balance as balance_of, id, owner as owner_of};

/// The migrations, embedded when this crate is compiled.
pub const MIGRATIONS: EmbeddedMigrations = embed_migrations!();

pub fn open(connection: &mut PgConnection, owner: &str, balance: i64) -> QueryResult<i64> {
    diesel::insert_into(account)
        .values((owner_of.eq(owner), balance_of.eq(balance)))
        .returning(id)
        .get_result(connection)
}

pub fn balance(connection: &mut PgConnection, of: i64) -> QueryResult<i64> {
    account.find(of).select(balance_of).first(connection)
}

/// Moves an amount: both accounts change, or neither does.
pub fn transfer(connection: &mut PgConnection, from: i64, to: i64, amount: i64) -> QueryResult<()> {
    connection.transaction(|connection| {
        for (one, change) in [(to, amount), (from, -amount)] {
            diesel::update(account.find(one))
                .set(balance_of.eq(balance_of + change))
                .execute(connection)?;
        }
        Ok(())
    })
}
