"""Measure the loss landscape while a model trains: PyTorch Lightning callbacks and functions."""

__version__ = "0.1.0"
