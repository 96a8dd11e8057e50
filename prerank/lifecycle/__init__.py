"""The life of a version: build, validate, promote."""
