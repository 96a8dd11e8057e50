"""One command a verb."""

from prerank.cli.app import main

__all__ = ["main"]
