"""Several models trained and judged on the same images, and what that shows."""
