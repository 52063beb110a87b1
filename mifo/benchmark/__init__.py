"""How long learning and synthesis take, and how much memory, on models of real shapes with random weights."""
