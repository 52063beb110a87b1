"""Losses on the attention maps of words: one file a loss, `timeline.py` says which is active when."""
