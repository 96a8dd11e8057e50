"""How good a version is, beside floors anyone can compute."""
