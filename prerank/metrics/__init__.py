"""Arrays in, numbers out: how good an order is, how well a probability is known, and how sure we are."""
