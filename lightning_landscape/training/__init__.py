"""The Lightning side: when to measure, on which data, in isolation, and where the values go."""
