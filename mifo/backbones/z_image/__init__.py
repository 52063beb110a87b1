"""Z-Image: a transformer of one stream, in which words and pixels have the same weights."""
