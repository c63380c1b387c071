"""Bytes to embedding: admission, decoding, batching, the model. Knows no HTTP."""
