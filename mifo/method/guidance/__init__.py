"""Box guidance: the loss on attention, its weights, and the descent of the latents on it."""
