"""Rules of the business as tensors: what a prediction is worth."""
