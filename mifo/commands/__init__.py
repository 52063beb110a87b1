"""The tasks of the command line, each one linear function of its settings."""
