"""The typed configuration: where it lies, what it may hold, and refusals in one sentence."""
