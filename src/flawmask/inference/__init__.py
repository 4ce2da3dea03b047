"""Inference: from an image to the defects on it."""
