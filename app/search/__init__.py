"""Embeddings to neighbours: collections that are kept on disk, searched in memory, and bound to one model.

Knows nothing of HTTP, images or networks: vectors, ids and metadata come in, ids and cosines go out.

    collection.py   the seam: what a collection promises, whatever engine keeps it
    embedded/       the engine inside this process: SQLite is the truth
    memory/         its search in memory, derived from the store
    milvus/         the engine on a Milvus server
    filters.py      the language of filters; rows.py and rules.py: what may be kept and asked
    ranking.py      likes and dislikes, diversity; grouping.py: the best of each value of a field
    reading/        a collection as a whole: its map, its duplicates, its clusters
    parquet.py      collections to files, and parquet_import.py back
"""
