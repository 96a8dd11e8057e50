"""How a server logs: JSON on stderr, a line each."""

from __future__ import annotations

import logging
import sys

import structlog


def log_to_stderr() -> None:
    """Let every line of this process from here on be JSON, with its time in UTC, its level and what it is bound to."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
