CREATE TABLE account (
    number  int PRIMARY KEY,
    balance numeric NOT NULL CONSTRAINT not_overdrawn CHECK (balance >= 0)
);
