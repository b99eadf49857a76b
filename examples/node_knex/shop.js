// The application: customers and their orders.

// Stores an order, and the customer with the first order, in one transaction.
async function order(knex, email, amount) {
  return knex.transaction(async (trx) => {
    const [{ id }] = await trx("customer").insert({ email }).onConflict("email").merge().returning("id");
    await trx("order").insert({ customer_id: id, amount });
    return id;
  });
}

async function ordered(knex, email) {
  const { sum } = await knex("order")
    .join("customer", "customer.id", "order.customer_id")
    .where({ email })
    .sum("amount")
    .first();
  return Number(sum);
}

module.exports = { order, ordered };
