// The agent for the peers in Node.js: `agent.mjs PEER`. The README above describes its commands.
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { PGlite } from "@electric-sql/pglite";
import pg from "pg";

const REST_MS = 100; // before a single database is requested, so that one may be ready
const WORK_MS = 25;
const QUIET_MS = 200;
const COUNT = "SELECT count(*) FROM t0";
const SERVER = process.env.BENCH_SERVER;

class Cannot extends Error {}

const TABLES = Array.from({ length: 50 }, (_, i) =>
  [`CREATE TABLE t${i} (a int, b int, c int, d int)`, ..."abcd"].map((part, at) =>
    at === 0 ? part : `CREATE INDEX ON t${i} (${part})`,
  ).join(";"),
).join(";");

async function connected(url) {
  const client = new pg.Client({ connectionString: url });
  await client.connect();
  return { query: (...words) => client.query(...words), close: () => client.end() };
}

async function makeTables(url) {
  const client = await connected(url);
  const { rows } = await client.query("SELECT to_regclass('t0') IS NOT NULL AS there");
  if (!rows[0].there) await client.query(TABLES);
  await client.close();
}

const named = (name) => SERVER.replace(/[^/]*$/, name);

/** Waits until the number of databases in the server is stable; returns for how long it has been. */
async function unchanged(watch) {
  let before;
  let changed = performance.now();
  while (performance.now() - changed < QUIET_MS) {
    const { rows } = await watch.query("SELECT count(*)::int AS n FROM pg_database");
    if (rows[0].n !== before) changed = performance.now();
    before = rows[0].n;
    await sleep(1);
  }
  return performance.now() - changed;
}

/** A peer with nothing to wait for, since closing a database waits for its drop. */
class Peer {
  async prepare() {}
  async server() {
    throw new Cannot("it uses a running server");
  }
  async hold() {
    throw new Cannot("it uses a running server");
  }
  async template() {}
  /** A connection to watch until all databases are dropped, if closing does not wait for that. */
  async watch() {}
  async end() {}
}

/**
 * Instances in this process, each loaded from a dump that was made in advance. A `clone()` would make a new dump
 * each time. The dump of an empty instance that ships as prepopulatedfs is guaranteed only for an older version.
 */
class Lite extends Peer {
  #dumps = {};

  async prepare() {
    await this.template("empty");
  }
  /** Runs initdb if nothing was prepared. */
  async server() {
    return await this.database("empty");
  }
  async hold() {
    throw new Cannot("it is not a server, and runs in the process");
  }
  async template(content) {
    if (this.#dumps[content]) return;
    const one = await PGlite.create({ loadDataDir: this.#dumps.empty });
    if (content === "fifty") await one.exec(TABLES);
    this.#dumps[content] = await one.dumpDataDir("none");
    await one.close();
  }
  async database(content) {
    const one = await PGlite.create({ loadDataDir: this.#dumps[content] });
    return { query: (...words) => one.query(...words), close: () => one.close() };
  }
}

class PgTemp extends Peer {
  #made = false;

  async template(content) {
    if (content !== "fifty" || this.#made) return;
    this.#made = true; // opening a template creates a new version of it
    await makeTables(`${SERVER}~template`);
  }
  async database(content) {
    return await connected(content === "fifty" ? SERVER : named(content));
  }
  async watch(content) {
    return await this.database(content);
  }
}

/** An existing database. */
class Direct extends Peer {
  async prepare() {
    const client = await connected(SERVER);
    await client.query("CREATE DATABASE old_fifty").catch((error) => {
      if (error.code !== "42P04") throw error;
    });
    await client.close();
    await makeTables(named("old_fifty"));
  }
  async database() {
    return await connected(named("old_fifty"));
  }
}

class Agent {

  constructor(peer) {
    this.peer = peer;
  }

  async runCommand([command, ...words]) {
    switch (command) {
      case "prepare":
        await this.peer.prepare();
        return {};
      case "server":
        return { ms: await this.#first(() => this.peer.server(), "SELECT 1") };
      case "hold":
        return await this.peer.hold();
      case "database":
        await this.peer.template("fifty");
        await sleep(REST_MS);
        return { ms: await this.#first(() => this.peer.database("fifty"), COUNT) };
      case "sustained":
        return { ms: await this.#sustained(Number(words[0]), Number(words[1]), words[2]) };
      case "suite":
        return { ms: await this.#suite(Number(words[0]), words[1] === "waiting") };
      default:
        throw new Error(`no such command: ${command}`);
    }
  }

  async #first(make, query) {
    const begun = performance.now();
    const one = await make();
    await one.query(query);
    const taken = performance.now() - begun;
    await one.close();
    return taken;
  }

  async #sustained(count, clients, content) {
    await this.peer.template(content);
    await this.#together(2 * clients + 8, clients, content);
    return await this.#untilDropped(content, () => this.#together(count, clients, content));
  }

  /** The time until all databases are dropped. The watching connection is opened before. */
  async #untilDropped(content, work) {
    const watch = await this.peer.watch(content);
    if (watch) await unchanged(watch);
    const begun = performance.now();
    await work();
    const idle = watch ? await unchanged(watch) : 0;
    const taken = performance.now() - begun - idle;
    await watch?.close();
    return taken;
  }

  async #together(count, clients, content) {
    let left = count;
    const client = async () => {
      while (left-- > 0) {
        const one = await this.peer.database(content);
        await one.query("SELECT 1");
        await one.close();
      }
    };
    await Promise.all(Array.from({ length: clients }, client));
  }

  async #suite(count, waiting) {
    await this.peer.template("fifty");
    await this.#together(10, 1, "fifty");
    return await this.#untilDropped("fifty", async () => {
      for (let i = 0; i < count; i++) await this.#test(i, waiting);
    });
  }

  async #test(number, waiting) {
    const one = await this.peer.database("fifty");
    await one.query("INSERT INTO t0 VALUES ($1, 1, 1, 1)", [number]);
    if (waiting) await sleep(WORK_MS);
    const { rows } = await one.query(COUNT);
    if (Number(rows[0].count) !== 1) throw new Error("the database is not fresh");
    await one.close();
  }

  async end() {
    await this.peer.end();
  }
}

const PEERS = { pglite: Lite, pgtemp: PgTemp, direct: Direct };
const agent = new Agent(new PEERS[process.argv[2]]());
for await (const line of createInterface({ input: process.stdin })) {
  let answer;
  try {
    answer = await agent.runCommand(line.trim().split(/\s+/));
  } catch (error) {
    answer = { error: error instanceof Cannot ? `cannot: ${error.message}` : String(error) };
  }
  console.log(JSON.stringify(answer));
}
await agent.end();
