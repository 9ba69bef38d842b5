"""Output of measured values: loggers, history, files."""
