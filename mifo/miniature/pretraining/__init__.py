"""Pretraining of the miniature's models, part by part, on scenes drawn on the device itself."""
