"""The search in memory of the engine inside this process: derived from the store, and never the truth."""
