exports.up = (knex) =>
  knex.schema.createTable("customer", (table) => {
    table.increments("id");
    table.text("email").notNullable().unique();
  });

exports.down = (knex) => knex.schema.dropTable("customer");
