"""Catalogue to shards: rights gate, decode, checks, chroma, tokens, captions, WebDataset shards."""
