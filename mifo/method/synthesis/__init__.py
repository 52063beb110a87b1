"""The synthesis loop: sampling with masked attention, box guidance and renewed shapes."""
