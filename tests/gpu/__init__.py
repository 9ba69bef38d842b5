"""Tests that need a GPU, skipped without one.  ``make test-gpu`` runs these and more."""
