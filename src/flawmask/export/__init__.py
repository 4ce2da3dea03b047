"""Exports trained networks to other runtimes, and proves that they predict the same there."""
