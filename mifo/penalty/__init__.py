"""Losses on cross-attention maps: MIFO's reward and penalty, Break-a-Scene's matching, and when each is active."""
