"""Batches, probes, and what is stored for a resumed run."""
