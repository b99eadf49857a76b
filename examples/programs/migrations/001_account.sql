CREATE TABLE account (
    number  int PRIMARY KEY,
    balance numeric NOT NULL CONSTRAINT not_overdrawn CHECK (balance >= 0)
);
INSERT INTO account SELECT number, 100 FROM generate_series(1, 1000) number;
