"""Embeddings to neighbours: collections that are kept on disk, searched in memory, and bound to one model.

Knows nothing of HTTP, images or networks: vectors, ids and metadata come in, ids and cosines go out.
"""
