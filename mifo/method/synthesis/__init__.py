"""The synthesis loop: DDIM with masked attention, box guidance and renewed shapes."""
