"""Embeddings to neighbours: collections that are kept on disk, searched in memory, and bound to one model.

Knows nothing of HTTP, images or networks: vectors, ids and metadata come in, ids and cosines go out.

    collection.py   the seam: what a collection promises, whatever engine keeps it
    library.py      the collections of a data directory; embedded.py: one of them
    store.py        the truth on disk; directory.py: whose directory it is
    index.py        the search in memory
    filters.py      the language of filters; filter_sql.py: as SQL
    rows.py         what may be kept
"""
