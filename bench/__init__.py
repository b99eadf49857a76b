"""Measurements: ratios to a real base, measured in the same run in alternation."""
