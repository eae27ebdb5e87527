"""Training: batches of preprocessed images, and the loops that learn from them."""
