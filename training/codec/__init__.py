"""Training of the EnCodec itself."""
