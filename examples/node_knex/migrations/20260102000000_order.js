exports.up = (knex) =>
  knex.schema.createTable("order", (table) => {
    table.increments("id");
    table.integer("customer_id").notNullable().references("customer.id");
    table.integer("amount").notNullable();
    table.check("amount > 0", [], "order_amount_positive");
  });

exports.down = (knex) => knex.schema.dropTable("order");
