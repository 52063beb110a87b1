"""Prompts: which tokens name an instance, and which are function words."""
