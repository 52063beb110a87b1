"""Losses on cross-attention maps: MIFO's and Break-a-Scene's, and when each is active."""
