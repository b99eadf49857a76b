CREATE TABLE transfer (
    source int NOT NULL REFERENCES account,
    target int NOT NULL REFERENCES account,
    amount numeric NOT NULL CHECK (amount > 0)
);
