mod database;

use std::time::Duration;

use database::{connection, database, options};
use sqlx::{query, query_scalar, Connection, PgConnection, PgPool, Result};

const OPEN_ONE: &str = "INSERT INTO account (owner, balance) VALUES ('ada', 100)";
const COUNT: &str = "SELECT count(*) FROM account";

/// Returns the SQLSTATE of a database error.
fn sqlstate<T: std::fmt::Debug>(result: Result<T>) -> String {
    let error = result.unwrap_err().into_database_error().unwrap();
    error.code().unwrap().into_owned()
}

async fn backend(connection: &mut PgConnection) -> i32 {
    let pid = query_scalar("SELECT pg_backend_pid()");
    pid.fetch_one(connection).await.unwrap()
}

/// Waits until a backend is in `pg_sleep`, or is no longer.
async fn asleep(pool: &PgPool, pid: i32, wanted: bool) {
    let sleeps =
        "SELECT count(*) = 1 FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'";
    let found = async {
        while query_scalar::<_, bool>(sleeps)
            .bind(pid)
            .fetch_one(pool)
            .await
            .unwrap()
            != wanted
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), found)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_transfer_moves_money() {
    let pool = database("transfer").await;
    let ada = accounts::open(&pool, "ada", 100).await.unwrap();
    let bob = accounts::open(&pool, "bob", 0).await.unwrap();

    accounts::transfer(&pool, ada, bob, 30).await.unwrap();

    assert_eq!(accounts::balance(&pool, ada).await.unwrap(), 70);
    assert_eq!(accounts::balance(&pool, bob).await.unwrap(), 30);
}

#[tokio::test]
async fn an_overdraft_changes_nothing_and_has_its_sqlstate() {
    let pool = database("overdraft").await;
    let ada = accounts::open(&pool, "ada", 100).await.unwrap();
    let bob = accounts::open(&pool, "bob", 0).await.unwrap();

    let error = accounts::transfer(&pool, ada, bob, 101).await.unwrap_err();

    let error = error.into_database_error().unwrap();
    assert!(error.is_check_violation());
    assert_eq!(error.code().unwrap(), "23514");
    assert_eq!(error.constraint(), Some("never_overdrawn"));
    assert_eq!(accounts::balance(&pool, bob).await.unwrap(), 0);
}

#[tokio::test]
async fn an_error_has_its_sqlstate() {
    let mut connection = connection().await;
    for (statement, expected) in [
        ("SELECT 1/0", "22012"),
        ("SELECT * FROM nothing", "42P01"),
        ("SELEC 1", "42601"),
    ] {
        assert_eq!(
            sqlstate(query(statement).execute(&mut connection).await),
            expected
        );
    }
}

#[tokio::test]
async fn each_connection_has_a_database_of_its_own() {
    let mut first = connection().await;
    query(OPEN_ONE).execute(&mut first).await.unwrap();

    let mut next = connection().await;

    assert_eq!(
        query_scalar::<_, i64>(COUNT)
            .fetch_one(&mut next)
            .await
            .unwrap(),
        0
    );
    assert_eq!(
        query_scalar::<_, i64>(COUNT)
            .fetch_one(&mut first)
            .await
            .unwrap(),
        1
    );
}

#[tokio::test]
async fn the_connections_of_a_pool_share_a_database() {
    let pool = database("shared").await;
    query(OPEN_ONE).execute(&pool).await.unwrap();
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(pool.acquire().await.unwrap());
    }

    let mut pids = Vec::new();
    for connection in &mut held {
        let count: i64 = query_scalar(COUNT)
            .fetch_one(&mut **connection)
            .await
            .unwrap();
        assert_eq!(count, 1);
        pids.push(backend(connection).await);
    }

    pids.sort();
    pids.dedup();
    assert_eq!(pids.len(), 4);
}

#[tokio::test]
async fn two_sessions_do_not_see_each_other() {
    let (one, other) = (database("one").await, database("other").await);

    query(OPEN_ONE).execute(&one).await.unwrap();

    assert_eq!(
        query_scalar::<_, i64>(COUNT)
            .fetch_one(&other)
            .await
            .unwrap(),
        0
    );
}

/// sqlx does not send cancel requests, so another connection of the pool calls
/// `pg_cancel_backend`.
#[tokio::test]
async fn a_cancelled_statement_leaves_its_connection_usable() {
    let (pool, neighbours) = (database("cancelled").await, database("neighbours").await);
    let mut busy = pool.acquire().await.unwrap();
    let mut neighbour = neighbours.acquire().await.unwrap();
    let (pid, neighbour_pid) = (backend(&mut busy).await, backend(&mut neighbour).await);

    let long = query("SELECT pg_sleep(60)").execute(&mut *busy);
    let next_door = query("SELECT pg_sleep(2)").execute(&mut *neighbour);
    let cancel = async {
        asleep(&pool, pid, true).await;
        asleep(&neighbours, neighbour_pid, true).await;
        query("SELECT pg_cancel_backend($1)")
            .bind(pid)
            .execute(&pool)
            .await
    };
    let (long, next_door, cancel) = tokio::join!(long, next_door, cancel);

    cancel.unwrap();
    assert_eq!(sqlstate(long), "57014");
    next_door.unwrap();
    query(OPEN_ONE).execute(&mut *busy).await.unwrap();
    assert_eq!(backend(&mut busy).await, pid);
}

/// Most applications use a timeout: the server cancels a statement that takes too long.
#[tokio::test]
async fn a_statement_that_takes_too_long_leaves_its_connection_usable() {
    let options = options().options([("statement_timeout", "1s")]);
    let mut connection = PgConnection::connect_with(&options).await.unwrap();
    let pid = backend(&mut connection).await;

    let long = query("SELECT pg_sleep(60)").execute(&mut connection).await;

    assert_eq!(sqlstate(long), "57014");
    assert_eq!(backend(&mut connection).await, pid);
}

/// A dropped future leaves its statement running; the statement ends when the connection closes
/// and its database is dropped.
#[tokio::test]
async fn an_abandoned_statement_ends_with_its_connection() {
    let onlooker = database("onlooker").await;
    let mut connection = connection().await;
    let pid = backend(&mut connection).await;
    let long = query("SELECT pg_sleep(60)").execute(&mut connection);
    tokio::select! {
        _ = long => unreachable!(),
        () = asleep(&onlooker, pid, true) => (),
    }

    connection.close_hard().await.unwrap();

    asleep(&onlooker, pid, false).await;
    query(OPEN_ONE).execute(&onlooker).await.unwrap();
}
