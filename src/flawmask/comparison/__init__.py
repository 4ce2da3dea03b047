"""Train and evaluate several models on the same images, and compare them."""
