"""What transformers share whose pixels and words attend to each other in one row."""
