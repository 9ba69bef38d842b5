"""The host side: when to measure, on which data, without touching the run, and where values go."""
