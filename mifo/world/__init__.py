"""The drawn world: things, backgrounds, scenes and their truth, words."""
