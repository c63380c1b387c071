"""One file for each command of `dino-train`: its settings, and one function that does it."""
