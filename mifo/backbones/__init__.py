"""Model families behind the seam of `mifo/method/backbone.py`: loading, new words, learning, results."""
