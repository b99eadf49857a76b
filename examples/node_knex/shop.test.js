// Run with node --test. DATABASE_URL names a daemon whose template is migrated: see README.md.
const { randomUUID } = require("node:crypto");
const assert = require("node:assert/strict");
const { test } = require("node:test");
const Knex = require("knex");
const config = require("./knexfile");
const { order, ordered } = require("./shop");

assert.ok(config.connection, "DATABASE_URL does not lead to a daemon: see README.md");

// Opens Knex with one connection, which has a database of its own.
function openAlone(t) {
  const knex = Knex({ ...config, pool: { min: 1, max: 1 } });
  t.after(() => knex.destroy());
  return knex;
}

// Opens Knex with a pool in a session of its own: all its connections share one database.
function open(t, pool = { min: 0, max: 4 }) {
  const knex = Knex({ ...config, connection: `${config.connection}~${randomUUID()}`, pool });
  t.after(() => knex.destroy());
  return knex;
}

async function pid(knex) {
  return (await knex.raw("SELECT pg_backend_pid() AS pid")).rows[0].pid;
}

test("each connection has a database of its own, and it is migrated", async (t) => {
  const first = openAlone(t);
  const [done, pending] = await first.migrate.list();
  assert.equal(done.length, 2);
  assert.deepEqual(pending, []);
  await order(first, "ann@example.org", 3);
  assert.equal(await ordered(first, "ann@example.org"), 3);

  assert.equal(await ordered(openAlone(t), "ann@example.org"), 0);
});

test("the connections of a pool share the database of their session", async (t) => {
  const knex = open(t);
  await order(knex, "ann@example.org", 3);
  const transactions = await Promise.all([1, 2, 3, 4].map(() => knex.transaction()));
  const pids = new Set(await Promise.all(transactions.map(pid)));
  const seen = await Promise.all(transactions.map((trx) => ordered(trx, "ann@example.org")));
  await Promise.all(transactions.map((trx) => trx.rollback()));
  assert.equal(pids.size, 4); // four connections
  assert.deepEqual(seen, [3, 3, 3, 3]);
});

test("orders at once are all there", async (t) => {
  const knex = open(t);
  await Promise.all(Array.from({ length: 20 }, () => order(knex, "ann@example.org", 1)));
  assert.equal(await ordered(knex, "ann@example.org"), 20);
});

test("two sessions do not see each other", async (t) => {
  const [one, other] = [open(t), open(t)];
  await order(one, "ann@example.org", 3);
  assert.equal(await ordered(other, "ann@example.org"), 0);
});

test("migrations can be tried, back and forth", async (t) => {
  const knex = open(t);
  await knex.migrate.down();
  assert.equal(await knex.schema.hasTable("order"), false);
  await knex.migrate.latest();
  assert.equal(await knex.schema.hasTable("order"), true);
});

test("a statement that takes too long is cancelled", async (t) => {
  const knex = open(t, { min: 0, max: 1 });
  await order(knex, "ann@example.org", 3);
  const before = await pid(knex);
  const asleep = knex.raw("SELECT pg_sleep(60)").timeout(200, { cancel: true });
  await assert.rejects(asleep, Knex.KnexTimeoutError);
  assert.equal(await pid(knex), before); // on the same connection
  assert.equal(await ordered(knex, "ann@example.org"), 3);
});

test("an error keeps PostgreSQL's SQLSTATE", async (t) => {
  const knex = open(t);
  await knex("customer").insert({ email: "ann@example.org" });
  await assert.rejects(knex("customer").insert({ email: "ann@example.org" }), { code: "23505" });
  const refused = { code: "23514", constraint: "order_amount_positive" };
  await assert.rejects(order(knex, "bob@example.org", 0), refused);
  assert.equal(await knex("customer").where({ email: "bob@example.org" }).first(), undefined);
});
