"""Embeddings to neighbours: collections on disk and their search. Knows no HTTP."""
