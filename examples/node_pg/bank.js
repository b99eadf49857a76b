// The application: accounts in PostgreSQL, through a pg pool.

class Bank {
  constructor(pool) {
    this.pool = pool;
  }

  async open(number, balance) {
    await this.pool.query("INSERT INTO account VALUES ($1, $2)", [number, balance]);
  }

  // Moves an amount from one account to another, or changes nothing.
  async transfer(source, target, amount) {
    const client = await this.pool.connect();
    const add = "UPDATE account SET balance = balance + $2 WHERE number = $1";
    try {
      await client.query("BEGIN");
      await client.query(add, [target, amount]);
      await client.query(add, [source, -amount]);
      await client.query("COMMIT");
    } catch (error) {
      await client.query("ROLLBACK");
      throw error;
    } finally {
      client.release();
    }
  }

  async total() {
    const { rows } = await this.pool.query("SELECT coalesce(sum(balance), 0)::int AS total FROM account");
    return rows[0].total;
  }
}

module.exports = { Bank };
