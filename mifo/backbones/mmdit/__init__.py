"""Stable Diffusion 3 and 3.5: a transformer whose pixels and words attend to each other in one row."""
