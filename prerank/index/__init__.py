"""The k most similar eligible rows."""
