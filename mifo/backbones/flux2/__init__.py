"""FLUX.2 [klein]: a transformer of two streams, then of one, whose pixels are patches of two by two."""
