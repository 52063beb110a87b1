"""Diffusion models: loading, new token rows, text and latents, saving and loading what was learned."""
