"""Runs with a name: each is a function that returns all settings of a run."""
