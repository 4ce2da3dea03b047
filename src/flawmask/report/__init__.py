"""`report.html`, the results of `evaluate` as one self-contained page; and a page with several runs side by side."""
