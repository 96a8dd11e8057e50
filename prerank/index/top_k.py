"""Where the order of an index comes from: `kernels.top_k`, under the name by which others ask for it."""

from prerank.kernels.top_k import NONE, order_keys, value_and_row

__all__ = ["NONE", "order_keys", "value_and_row"]
