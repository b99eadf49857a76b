//! `#[sqlx::test]` creates databases itself, so it needs a daemon with a single server: `--single`.

use sqlx::PgPool;

#[sqlx::test]
#[ignore = "needs pgtemp --single"]
async fn it_makes_a_database_for_each_test(pool: PgPool) {
    accounts::open(&pool, "ada", 100).await.unwrap();
}

#[sqlx::test]
#[ignore = "needs pgtemp --single"]
async fn the_next_test_sees_nothing_of_it(pool: PgPool) {
    accounts::open(&pool, "ada", 100).await.unwrap();
}
