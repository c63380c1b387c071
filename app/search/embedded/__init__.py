"""The engine inside this process: SQLite on disk is the truth, memory the search."""
