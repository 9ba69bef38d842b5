"""Where measured values go: loggers, history, files."""
