"""The hot operations: each has a torch reference, a native version for CPUs, a Triton one, and one contract for all."""
