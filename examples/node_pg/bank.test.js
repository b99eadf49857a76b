// Run with node --test. DATABASE_URL names a daemon: see README.md.
const { randomUUID } = require("node:crypto");
const assert = require("node:assert/strict");
const { test } = require("node:test");
const { Client, Pool } = require("pg");
const { Bank } = require("./bank");

const url = process.env.DATABASE_URL;
assert.ok(url, "DATABASE_URL does not lead to a daemon: see README.md");

// Opens one connection, with a new and migrated database.
async function connect(t, more = {}) {
  const client = new Client({ connectionString: url, ...more });
  await client.connect();
  t.after(() => client.end());
  return client;
}

// Opens a pool in a session of its own: all its connections share one database.
function openPool(t, session = randomUUID(), more = {}) {
  const pool = new Pool({ connectionString: `${url}~${session}`, max: 4, ...more });
  t.after(() => pool.end());
  return pool;
}

async function count(client) {
  const { rows } = await client.query("SELECT count(*)::int AS number FROM account");
  return rows[0].number;
}

test("each connection has a database of its own", async (t) => {
  const first = await connect(t);
  await first.query("INSERT INTO account VALUES ($1, $2)", [1, "12.50"]);
  const { rows } = await first.query("SELECT balance FROM account");
  assert.deepEqual(rows, [{ balance: "12.50" }]);

  const second = await connect(t);
  assert.equal(await count(second), 0);
});

test("the connections of a pool share the database of their session", async (t) => {
  const pool = openPool(t);
  const clients = await Promise.all([1, 2, 3, 4].map(() => pool.connect()));
  try {
    await clients[0].query("INSERT INTO account VALUES (1, 100)");
    for (const client of clients) assert.equal(await count(client), 1);
    assert.equal(pool.totalCount, 4);
  } finally {
    for (const client of clients) client.release();
  }
});

test("transfers at once lose nothing", async (t) => {
  const bank = new Bank(openPool(t));
  await bank.open(1, 100);
  await bank.open(2, 0);
  await Promise.all(Array.from({ length: 20 }, () => bank.transfer(1, 2, 5)));
  assert.equal(await bank.total(), 100);
  await assert.rejects(bank.transfer(1, 2, 1), { constraint: "not_overdrawn" }); // the balance is 0
});

test("two sessions do not see each other", async (t) => {
  const one = new Bank(openPool(t));
  const other = new Bank(openPool(t));
  await one.open(1, 100);
  assert.equal(await other.total(), 0);
  await other.open(1, 7);
  assert.equal(await one.total(), 100);
});

test("another connection of the session cancels a statement", { timeout: 60_000 }, async (t) => {
  const pool = openPool(t);
  await new Bank(pool).open(1, 100);
  const client = await pool.connect();
  try {
    const { rows } = await client.query("SELECT pg_backend_pid() AS pid");
    const asleep = client.query("SELECT pg_sleep(60)").catch((error) => error);
    const sleeping = "SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'";
    while (!(await pool.query(sleeping, [rows[0].pid])).rowCount);
    await pool.query("SELECT pg_cancel_backend($1)", [rows[0].pid]);
    assert.equal((await asleep).code, "57014"); // query_canceled
    assert.equal(await count(client), 1); // on the same connection
  } finally {
    client.release();
  }
});

test("a statement that takes too long is cancelled", async (t) => {
  const client = await connect(t, { statement_timeout: 100, query_timeout: 10_000 });
  await client.query("INSERT INTO account VALUES (1, 100)");
  await assert.rejects(client.query("SELECT pg_sleep(60)"), { code: "57014" });
  assert.equal(await count(client), 1); // on the same connection, in the same database
});

test("an error is PostgreSQL's own", async (t) => {
  const client = await connect(t);
  await assert.rejects(client.query("SELECT 1/0"), { code: "22012" });
  const bank = new Bank(openPool(t));
  await bank.open(1, 100);
  await assert.rejects(bank.open(1, 5), { code: "23505" }); // unique_violation
  await assert.rejects(bank.transfer(1, 2, 500), { code: "23514" }); // check_violation
  assert.equal(await bank.total(), 100);
});
