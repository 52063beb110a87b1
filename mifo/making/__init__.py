"""Making pictures: of a prompt and its boxes, and of the classes for the prior."""
