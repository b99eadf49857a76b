CREATE TABLE IF NOT EXISTS item (
    name   text PRIMARY KEY,
    amount int NOT NULL CONSTRAINT in_stock CHECK (amount >= 0)
);
