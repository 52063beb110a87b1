"""Model families behind the one seam of `mifo/method/backbone.py`: loading, new words, what learns, learned results."""
