"""Templates: recipes, builders, clones and recycled directories."""
