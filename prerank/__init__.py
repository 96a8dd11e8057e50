"""prerank: the early half of an ads or recommendation funnel, from logs to served winners."""

__version__ = "0.1.0"
