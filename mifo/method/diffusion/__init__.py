"""Noise processes: how noise is added in learning and taken away in sampling."""
