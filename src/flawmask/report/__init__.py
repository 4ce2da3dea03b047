"""`report.html`: what `evaluate` found as one page that needs nothing else, and several runs side by side."""
