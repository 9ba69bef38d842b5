"""Restores everything that measuring must not change."""
