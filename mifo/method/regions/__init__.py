"""Where instances stand: boxes as grids, and the shapes that attention forms inside them."""
