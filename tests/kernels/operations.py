"""Every operation as a function of tensors, and some tensors for it."""

import torch

from prerank.kernels import cross, eligible, gather_add, greedy, scan


def eligible_of_700(bitmaps, chosen, starts, inverted):
    return eligible.eligible_rows(bitmaps, chosen, starts, inverted, 700)


def greedy_7(utility, rows, valid, groups, at_most):
    return greedy.greedy_top_k(utility, rows, valid, groups, at_most, 7)


def scan_7(vectors, query):
    return scan.scan_top_k(vectors, None, query, 7, None)


def asked():
    """By the operation's name: a function of tensors and some of them."""
    made = torch.Generator().manual_seed(1)

    def randn(*size):
        return torch.randn(size, generator=made)

    def randint(high, *size):
        return torch.randint(0, high, size, generator=made)

    rows, at_most = randint(50, 2, 60), torch.tensor([2, 3])
    groups = (randn(2, 60), rows, rows > 5, randint(9, 2, 2, 60).int(), at_most)
    some = (torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 1, 2]), torch.tensor([False, True]))
    return {
        "eligible_rows": (eligible_of_700, (randint(1 << 62, 3, 11), *some)),
        "greedy_top_k": (greedy_7, groups),
        "scan_top_k": (scan_7, (randn(90, 8), randn(2, 8))),
        "gather_add": (gather_add.gather_add, (randn(50, 8), rows, randn(2, 8), randn(2, 60, 3), randn(8, 3))),
        "cross_layer": (cross.cross_layer, (randn(9, 8), randn(9, 8), randn(2, 8), randn(8, 2), randn(8))),
    }
