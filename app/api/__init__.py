"""The part that speaks HTTP: one file per resource, and one table from errors to answers."""
