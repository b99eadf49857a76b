"""Templates: recipes, builders, clones, recycling, and the proof that a clone is unmodified."""
