"""A simulated ad market of any size, with the true probability of every click."""
