mod database;

use std::thread;
use std::time::{Duration, Instant};

use accounts::schema::account::dsl::account;
use database::{database, migrate, url, Pooled};
use diesel::prelude::*;
use diesel::result::DatabaseErrorKind::{self, CheckViolation, UniqueViolation, Unknown};
use diesel::result::{DatabaseErrorInformation, Error};
use diesel::{dsl, sql_types};

fn backend(connection: &mut PgConnection) -> i32 {
    let pid = dsl::sql::<sql_types::Integer>("pg_backend_pid()");
    diesel::select(pid).get_result(connection).unwrap()
}

fn sleep(connection: &mut PgConnection, seconds: f64) -> QueryResult<usize> {
    diesel::sql_query("SELECT pg_sleep($1)")
        .bind::<sql_types::Double, _>(seconds)
        .execute(connection)
}

fn wait_until_asleep(onlooker: &mut PgConnection, pid: i32) {
    let too_late = Instant::now() + Duration::from_secs(20);
    loop {
        let found = diesel::sql_query(
            "SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'",
        )
        .bind::<sql_types::Integer, _>(pid)
        .execute(onlooker);
        if found.unwrap() == 1 {
            return;
        }
        assert!(Instant::now() < too_late, "{pid} does not sleep");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Returns the kind and the details of an error. Diesel has kinds for the common SQLSTATEs; for
/// all others only the message can be checked.
fn database_error<T: std::fmt::Debug>(
    result: QueryResult<T>,
) -> (
    DatabaseErrorKind,
    Box<dyn DatabaseErrorInformation + Send + Sync>,
) {
    match result.unwrap_err() {
        Error::DatabaseError(kind, said) => (kind, said),
        other => panic!("not the database's: {other}"),
    }
}

#[test]
fn a_transfer_moves_money() {
    let connection = &mut database("transfer").get().unwrap();
    let ada = accounts::open(connection, "ada", 100).unwrap();
    let bob = accounts::open(connection, "bob", 0).unwrap();

    accounts::transfer(connection, ada, bob, 30).unwrap();

    assert_eq!(accounts::balance(connection, ada), Ok(70));
    assert_eq!(accounts::balance(connection, bob), Ok(30));
}

#[test]
fn an_overdraft_changes_nothing() {
    let connection = &mut database("overdraft").get().unwrap();
    let ada = accounts::open(connection, "ada", 100).unwrap();
    let bob = accounts::open(connection, "bob", 0).unwrap();

    let (kind, said) = database_error(accounts::transfer(connection, ada, bob, 101));

    assert!(matches!(kind, CheckViolation));
    assert_eq!(said.constraint_name(), Some("never_overdrawn"));
    assert_eq!(accounts::balance(connection, bob), Ok(0));
}

#[test]
fn an_error_keeps_its_kind() {
    let connection = &mut database("kinds").get().unwrap();
    accounts::open(connection, "ada", 100).unwrap();

    let (kind, said) = database_error(accounts::open(connection, "ada", 1));
    assert!(matches!(kind, UniqueViolation));
    assert_eq!(said.table_name(), Some("account"));
    assert_eq!(said.details(), Some("Key (owner)=(ada) already exists."));

    let (kind, said) = database_error(diesel::sql_query("SELECT 1/0").execute(connection));
    assert!(matches!(kind, Unknown));
    assert_eq!(said.message(), "division by zero");
}

#[test]
fn each_connection_has_a_database_of_its_own() {
    let mut first = PgConnection::establish(&url()).unwrap();
    migrate(&mut first);
    accounts::open(&mut first, "ada", 100).unwrap();

    let mut next = PgConnection::establish(&url()).unwrap();
    migrate(&mut next);

    assert_eq!(account.count().get_result(&mut next), Ok(0));
    assert_eq!(account.count().get_result(&mut first), Ok(1));
}

#[test]
fn the_connections_of_a_pool_share_a_database() {
    let pool = database("shared");
    accounts::open(&mut pool.get().unwrap(), "ada", 100).unwrap();
    let mut held: Vec<Pooled> = (0..4).map(|_| pool.get().unwrap()).collect();

    for connection in &mut held {
        assert_eq!(account.count().get_result(connection), Ok(1));
    }

    let mut pids: Vec<i32> = held.iter_mut().map(|one| backend(one)).collect();
    pids.sort();
    pids.dedup();
    assert_eq!(pids.len(), 4);
}

#[test]
fn two_sessions_do_not_see_each_other() {
    let (one, other) = (database("one"), database("other"));

    accounts::open(&mut one.get().unwrap(), "ada", 100).unwrap();

    let seen = account.count().get_result(&mut other.get().unwrap());
    assert_eq!(seen, Ok(0));
}

/// Diesel has no interface to libpq's cancel requests, so another connection of the session calls
/// `pg_cancel_backend`.
#[test]
fn a_cancelled_statement_leaves_its_connection_usable() {
    let (pool, neighbours) = (database("cancelled"), database("neighbours"));
    let (mut busy, mut onlooker) = (pool.get().unwrap(), pool.get().unwrap());
    let mut neighbour = neighbours.get().unwrap();
    let (pid, neighbour_pid) = (backend(&mut busy), backend(&mut neighbour));

    let long = thread::spawn(move || (sleep(&mut busy, 60.0), busy));
    let next_door = thread::spawn(move || sleep(&mut neighbour, 2.0));
    wait_until_asleep(&mut onlooker, pid);
    wait_until_asleep(&mut onlooker, neighbour_pid);
    diesel::sql_query("SELECT pg_cancel_backend($1)")
        .bind::<sql_types::Integer, _>(pid)
        .execute(&mut onlooker)
        .unwrap();

    let (result, mut busy) = long.join().unwrap();
    let (_, said) = database_error(result);
    assert_eq!(said.message(), "canceling statement due to user request");
    next_door.join().unwrap().unwrap();
    accounts::open(&mut busy, "ada", 100).unwrap();
    assert_eq!(backend(&mut busy), pid);
}

/// Most applications use a timeout: the server cancels a statement that takes too long.
#[test]
fn a_statement_that_takes_too_long_leaves_its_connection_usable() {
    let mut connection = database("timeout").get().unwrap();
    let pid = backend(&mut connection);
    diesel::sql_query("SET statement_timeout = '1s'")
        .execute(&mut connection)
        .unwrap();

    let (_, said) = database_error(sleep(&mut connection, 60.0));

    assert_eq!(
        said.message(),
        "canceling statement due to statement timeout"
    );
    accounts::open(&mut connection, "ada", 100).unwrap();
    assert_eq!(backend(&mut connection), pid);
}
