"""The callbacks: thin, one file each.  What is measured is in geometry/, when in training/."""
