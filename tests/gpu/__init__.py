"""What only a GPU can show; skipped without one.  ``make test-gpu`` runs these and more."""
