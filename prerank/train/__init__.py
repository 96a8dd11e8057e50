"""Logs to trained towers and rankers."""
