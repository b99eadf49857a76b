// Package stock counts the items in stock, through database/sql.
package stock

import (
	"context"
	"database/sql"
	"embed"
	"io/fs"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Migrate creates the tables that do not exist yet.
func Migrate(ctx context.Context, db *sql.DB) error {
	names, err := fs.Glob(migrations, "migrations/*.sql")
	if err != nil {
		return err
	}
	for _, name := range names {
		text, err := migrations.ReadFile(name)
		if err != nil {
			return err
		}
		if _, err := db.ExecContext(ctx, string(text)); err != nil {
			return err
		}
	}
	return nil
}

// Add puts items in stock.
func Add(ctx context.Context, db *sql.DB, name string, amount int) error {
	_, err := db.ExecContext(ctx,
		`INSERT INTO item VALUES ($1, $2)
		ON CONFLICT (name) DO UPDATE SET amount = item.amount + excluded.amount`, name, amount)
	return err
}

// Take takes the given amount of each item from the stock, or nothing if one of them is short.
func Take(ctx context.Context, db *sql.DB, order map[string]int) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	for name, amount := range order {
		const take = "UPDATE item SET amount = amount - $2 WHERE name = $1"
		if _, err := tx.ExecContext(ctx, take, name, amount); err != nil {
			return err
		}
	}
	return tx.Commit()
}

// Amount returns the number of an item in stock; sql.ErrNoRows if the item was never added.
func Amount(ctx context.Context, db *sql.DB, name string) (amount int, err error) {
	err = db.QueryRowContext(ctx, "SELECT amount FROM item WHERE name = $1", name).Scan(&amount)
	return amount, err
}
