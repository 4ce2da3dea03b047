"""`serve`: verdicts over HTTP, and a page to drop images on. Only the backend of a checkpoint imports PyTorch."""
