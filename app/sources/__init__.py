"""Where pictures come from: folders, tar shards, lists, Parquet files. No network, no collection."""
