"""A collection as a whole: its map, its duplicates and its clusters, computed beside the service."""
