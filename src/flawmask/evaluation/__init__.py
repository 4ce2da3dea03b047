"""Evaluation: from predictions and truth to metrics."""
