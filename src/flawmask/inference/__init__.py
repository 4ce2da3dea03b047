"""From an image to the defects on it."""
