"""From predictions and truth to figures."""
