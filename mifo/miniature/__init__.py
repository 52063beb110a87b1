"""The embedded miniature: drawn scenes with their truth, and small models pretrained on them."""
