"""The hot operations: each has a torch reference, versions for CPUs and GPUs, and one contract for all of them."""
