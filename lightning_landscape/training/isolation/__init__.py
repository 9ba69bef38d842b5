"""What measuring must not change, and how it is restored."""
