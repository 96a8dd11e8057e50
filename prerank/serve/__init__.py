"""A request to winners."""
