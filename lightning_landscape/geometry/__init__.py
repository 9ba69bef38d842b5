"""Losses, curvature, sharpness and slices as pure functions; imports torch and numpy only."""
