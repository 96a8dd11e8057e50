"""One command a verb."""

from prerank.openmp import wait_briefly

wait_briefly()

from prerank.cli.app import main  # noqa: E402 - torch comes with it

__all__ = ["main"]
