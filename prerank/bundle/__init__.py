"""One immutable version of the whole funnel, and which one is live."""
