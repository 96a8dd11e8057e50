"""Tables in: a user's logs, public datasets, a simulated ad market."""
