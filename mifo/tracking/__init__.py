"""What loggers and dashboards are told about a run."""
