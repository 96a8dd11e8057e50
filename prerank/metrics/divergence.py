"""How far a probability is from another one of the same event."""

from __future__ import annotations

import numpy as np

from prerank.errors import DataError
from prerank.types import Array

_EPS = float(np.finfo(np.float64).eps)


def bernoulli_kl(teacher: Array, student: Array) -> Array:
    """KL(teacher || student) in nats, of probabilities of one shape [...] -> float64 [...], 0 or more.

    t log(t / s) + (1 - t) log((1 - t) / (1 - s)) (Kullback & Leibler 1951), 0 exactly where they are equal. A student's
    probability is kept 2.2e-16 away from 0 and 1, as `log_loss` does: certain and wrong costs 36 nats, not infinity.
    Raises DataError for what is not a probability.
    """
    assert teacher.shape == student.shape
    for name, prob in (("teacher", teacher), ("student", student)):
        if not ((prob >= 0) & (prob <= 1)).all():  # NaN is neither
            found = prob[~((prob >= 0) & (prob <= 1))][0]
            raise DataError(f"KL: expected probabilities from 0 to 1 of the {name}, found {found}; is it a logit?")
    t, s = teacher.astype(np.float64), student.astype(np.float64)
    kept = np.where(t == s, s, s.clip(_EPS, 1 - _EPS))  # equal and certain is no surprise
    more = kept - t
    nats: Array = np.maximum(
        _entropy(t, kept, more) + _entropy(1 - t, 1 - kept, -more), 0.0
    )  # rounding can make it less
    return nats


def xlogx(prob: Array) -> Array:
    """p log p of probabilities float64 [...], 0 where p is -> float64 [...]."""
    logs: Array = prob * np.log(prob, out=np.zeros_like(prob), where=prob > 0)
    return logs


def _entropy(p: Array, q: Array, more: Array) -> Array:
    """p log(p / q), 0 where p is, given more = q - p: near 1 the ratio itself would lose what tells the two apart."""
    near = np.abs(more) < p / 2
    log_ratio = np.zeros_like(p)
    np.log1p(np.divide(more, p, out=log_ratio, where=near), out=log_ratio, where=near)
    np.negative(log_ratio, out=log_ratio)
    far = ~near & (p > 0)
    np.log(np.divide(p, q, out=log_ratio, where=far), out=log_ratio, where=far)
    log_ratio *= p
    return log_ratio
