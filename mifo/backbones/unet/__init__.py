"""Attention layers of a diffusers U-Net: which there are, which are chosen, and how their maps are read."""
