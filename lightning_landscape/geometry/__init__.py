"""The science: losses, curvature, sharpness, slices.  Knows torch and numpy only."""
