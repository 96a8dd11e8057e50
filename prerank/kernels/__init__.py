"""The hot operations: each has a torch reference, a native version for CPUs, and one contract for both."""
