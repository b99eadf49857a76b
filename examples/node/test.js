// node --test: each connection to the daemon is a PostgreSQL of its own.
//   pgtemp postgresql://localhost:6543/test &
//   DATABASE_URL=postgresql://postgres@localhost:6543/test node --test test.js
const { test } = require("node:test");
const assert = require("node:assert");
const { Client } = require("pg");

async function fresh() {
  const client = new Client({ connectionString: process.env.DATABASE_URL });
  await client.connect();
  return client;
}

test("a table", async () => {
  const client = await fresh();
  await client.query("CREATE TABLE account (id int, balance numeric)");
  await client.query("INSERT INTO account VALUES ($1, $2)", [1, "12.50"]);
  const { rows } = await client.query("SELECT balance FROM account");
  assert.deepStrictEqual(rows, [{ balance: "12.50" }]);
  await client.end();
});

test("the next connection does not see it", async () => {
  const client = await fresh();
  const { rows } = await client.query("SELECT to_regclass('account') AS found");
  assert.strictEqual(rows[0].found, null);
  await client.end();
});

test("an error is PostgreSQL's own", async () => {
  const client = await fresh();
  await assert.rejects(client.query("SELECT 1/0"), { code: "22012" });
  await client.end();
});
