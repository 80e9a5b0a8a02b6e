"""The model: patterns, transformer, codec, conditions, sampling, generation. Imports neither Ray nor Lightning."""
