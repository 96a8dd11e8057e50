"""The known truth of the simulated market: the probability that a user clicks an ad, and then converts.

The click logit has four kinds of terms: context (surface, hour, device, format, position); a smooth taste dot product;
the affinity of every (segment, advertiser) pair and the user's visits to the advertiser's site, which no short dot
product holds; and what passed between this user and this advertiser in the log. `docs/market.md` writes it out.
It does not know who was shown what: the caller says so.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prerank.errors import DataError
from prerank.market import marginals as m
from prerank.market.hash import Doubles, Floats, Ints, normals, rows_of_ids, stream, uniforms
from prerank.market.population import Ads, Users, make_ads, make_users
from prerank.market.spec import MarketSpec, read_record

Surfaces: TypeAlias = str | Sequence[str] | NDArray[np.str_] | pa.Array | pa.ChunkedArray

_BLOCK: Final = 1 << 16
_SCALARS: Final = (
    "base", "taste", "affinity", "visited", "quality", "price", "views", "clicks", "position", "hour_swing",
    "hour_peak", "conversion_base",
)  # fmt: skip
_LAWS: Final[dict[str, Doubles]] = {
    name: np.array([getattr(law, name) for law in m.SURFACE_LAWS], np.float64) for name in _SCALARS
}
_DEVICE_EFFECT: Final[Doubles] = np.array([law.device for law in m.SURFACE_LAWS])
_FORMAT_EFFECT: Final[Doubles] = np.array([law.format for law in m.SURFACE_LAWS])


class MarketTruth:
    """The true probabilities of one market, for any pairs of its users and ads.

    Costs about 100 bytes of memory an ad. Rebuilt from the market's arguments alone, nothing else is read.
    """

    def __init__(self, spec: MarketSpec) -> None:
        self.spec = spec
        self.users: Users = make_users(spec)
        self.ads: Ads = make_ads(spec)
        self._affinity_stream = stream(spec.seed, "affinity")
        self._conversion_stream = stream(spec.seed, "affinity.conversion")
        # [S, D]: which hidden directions of taste count on which surface; mean square 1.
        place = np.arange(len(m.SURFACES) * m.LATENT_DIM, dtype=np.int64)
        gains = 0.2 + 1.6 * uniforms(stream(spec.seed, "surface.gain"), place).reshape(len(m.SURFACES), -1)
        self._gains: Floats = (gains / np.sqrt((gains**2).mean(axis=1, keepdims=True))).astype(np.float32)

    @classmethod
    def load(cls, market: Path) -> "MarketTruth":
        """The truth of the market that `generate_market` wrote into this folder.

        Raises DataError where `market.json` is missing, unreadable or of another generator version, or where the
        rebuilt truth does not answer the recorded probes as it did when the market was written.
        """
        spec, probes = read_record(market)
        truth = cls(spec)
        if not np.allclose(truth.probes(), probes, rtol=1e-6, atol=0.0):
            raise DataError(
                f"{market / 'market.json'} was written by other code: its truth is not the one rebuilt here; "
                "generate the market again"
            )
        return truth

    def click_prob(
        self,
        user_id: Ints,
        item_id: Ints,
        surface: Surfaces,
        hour: NDArray[np.integer],
        *,
        position: NDArray[np.integer] | int = 0,
        advertiser_views: NDArray[np.integer] | int = 0,
        advertiser_clicks: NDArray[np.integer] | int = 0,
    ) -> Doubles:
        """float64 [n] true click probabilities of n (user, ad) pairs.

        `user_id`, `item_id` int64 [n]; `surface` one name or n; `hour` [n] or [1], the user's local hour 0..23.
        `position` is 0 at the top. `advertiser_views` and `advertiser_clicks` count what the user saw of, and clicked
        on, the ad's advertiser before the current clock hour (UTC): `truth.parquet` holds them for every logged row;
        0 is a user who never met the advertiser. Raises DataError for unknown ids, surfaces or hours.
        """
        user, ad = self._rows("user", user_id), self._rows("item", item_id)
        n = max(len(user), len(ad))
        columns = [
            _column("surface", surface_codes(surface), n, len(m.SURFACES)),
            _column("hour", np.asarray(hour), n, 24),
            _column("position", np.asarray(position), n),
            _column("advertiser_views", np.asarray(advertiser_views), n),
            _column("advertiser_clicks", np.asarray(advertiser_clicks), n),
        ]
        user, ad = _column("user_id", user, n), _column("item_id", ad, n)
        return _sigmoid(self.click_logit(user, ad, *columns))

    def conversion_prob(self, user_id: Ints, item_id: Ints, surface: Surfaces) -> Doubles:
        """float64 [n] true probabilities that a click of these pairs ends in a conversion; the rest as `click_prob`."""
        user, ad = self._rows("user", user_id), self._rows("item", item_id)
        n = max(len(user), len(ad))
        codes = _column("surface", surface_codes(surface), n, len(m.SURFACES))
        return _sigmoid(self.conversion_logit(_column("user_id", user, n), _column("item_id", ad, n), codes))

    def probes(self) -> list[float]:
        """Click probabilities of 64 fixed pairs: equal for equal truths, so a changed generator is noticed."""
        k = np.arange(64, dtype=np.int64)
        user, ad = k * 7919 % self.spec.num_users, k * 104_729 % self.spec.num_ads
        logit = self.click_logit(user, ad, k % len(m.SURFACES), k % 24, k % 5, k % 7, k % 3)
        return [float(p) for p in _sigmoid(logit)]

    def affinity_logits(self, surface: str, *, num_advertisers: int | None = None) -> Doubles:
        """float64 [NUM_SEGMENTS, V]: the segment x advertiser part of the click logit on one surface.

        V is the number of advertisers, or of the first (largest) `num_advertisers`.
        """
        v = np.arange(min(num_advertisers or self.spec.num_advertisers, self.spec.num_advertisers), dtype=np.int64)
        segment = np.repeat(np.arange(m.NUM_SEGMENTS, dtype=np.int64), len(v))
        weight = m.SURFACE_LAWS[int(surface_codes(surface)[0])].affinity
        affinity = self._affinity(self._affinity_stream, segment, np.tile(v, m.NUM_SEGMENTS))
        return weight * affinity.astype(np.float64).reshape(m.NUM_SEGMENTS, len(v))

    def click_logit(
        self, user: Ints, ad: Ints, surface: Ints, hour: Ints, position: Ints, views: Ints, clicks: Ints
    ) -> Doubles:
        """float64 [n] click logits of rows (not ids) and surface codes; nothing is checked."""
        out = np.empty(len(user), np.float64)
        for at in range(0, len(user), _BLOCK):
            k = slice(at, at + _BLOCK)
            out[k] = self._context(user[k], ad[k], surface[k], hour[k], position[k])
            out[k] += _LAWS["taste"][surface[k]] * self.taste_match(user[k], ad[k], surface[k])
            segment, advertiser = self.users.segment[user[k]], self.ads.advertiser[ad[k]]
            affinity = self._affinity(self._affinity_stream, segment, advertiser)
            out[k] += _LAWS["affinity"][surface[k]] * affinity
            visited = (self.users.visited[user[k]] == advertiser[:, None]).any(axis=1)
            out[k] += _LAWS["visited"][surface[k]] * visited
            out[k] += _LAWS["clicks"][surface[k]] * np.log1p(clicks[k])
            out[k] -= _LAWS["views"][surface[k]] * np.log1p(views[k])
        return out

    def conversion_logit(self, user: Ints, ad: Ints, surface: Ints) -> Doubles:
        """float64 [n] conversion logits, given a click, of rows and surface codes; nothing is checked."""
        segment, advertiser = self.users.segment[user], self.ads.advertiser[ad]
        out = _LAWS["conversion_base"][surface] + 0.5 * self.taste_match(user, ad, surface)
        out += 0.6 * self._affinity(self._conversion_stream, segment, advertiser)
        out += 0.3 * self.ads.quality[ad] - 0.4 * self.ads.price_z[ad]
        return out

    def taste_match(self, user: Ints, ad: Ints, surface: Ints) -> Doubles:
        """float64 [n] taste . content with the surface's gains: deviation near 1 over random pairs."""
        taste = self.users.taste[user]
        taste *= self._gains[surface]
        return np.asarray(np.einsum("nd,nd->n", taste, self.ads.content[ad]), np.float64)

    def _context(self, user: Ints, ad: Ints, surface: Ints, hour: Ints, position: Ints) -> Doubles:
        phase = (hour - _LAWS["hour_peak"][surface]) * (math.tau / 24)
        out = _LAWS["base"][surface] + _LAWS["hour_swing"][surface] * np.cos(phase)
        out += _DEVICE_EFFECT[surface, self.users.device[user]]
        out += _FORMAT_EFFECT[surface, self.ads.format[ad]]
        out += self.users.propensity[user]
        out += _LAWS["quality"][surface] * self.ads.quality[ad]
        out -= _LAWS["price"][surface] * self.ads.price_z[ad]
        out -= _LAWS["position"][surface] * np.log1p(position)
        return out

    def _affinity(self, start: int, segment: NDArray[np.integer], advertiser: NDArray[np.integer]) -> Floats:
        return normals(start, (segment.astype(np.int64) << np.int64(32)) + advertiser)

    def _rows(self, kind: str, ids: Ints) -> Ints:
        ids = np.atleast_1d(np.asarray(ids))
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(
                f"{kind}_id must be a one-dimensional array of integers, got {ids.dtype} of shape {ids.shape}"
            )
        size = self.spec.num_users if kind == "user" else self.spec.num_ads
        rows = rows_of_ids(kind, ids)
        bad = (rows < 0) | (rows >= size)
        if bad.any():
            raise DataError(
                f"{kind}_id {ids[bad][0]} is not one of this market's {size} {kind}s; "
                f"{int(bad.sum())} of {len(ids)} are unknown: pass ids from its {kind}s.parquet"
            )
        return rows


def best_rank_error(logits: NDArray[np.floating], rank: int) -> float:
    """The share of a matrix that no product of two rank-`rank` factors can hold, 0..1.

    `logits` [users or segments, items or advertisers]. Row and column means are taken out first, as the biases of a
    two-tower model would hold them; what is left is compared with its best approximation in squared error. Source:
    Eckart and Young, Psychometrika 1936. Raises DataError for a rank below 0 or a matrix that is not two-dimensional.
    """
    if logits.ndim != 2 or rank < 0:
        raise DataError(
            f"best_rank_error needs a matrix and a rank of at least 0, got shape {logits.shape}, rank {rank}"
        )
    centred = logits - logits.mean(axis=0) - logits.mean(axis=1, keepdims=True) + logits.mean()
    energy = np.linalg.svd(centred.astype(np.float64), compute_uv=False) ** 2
    total = float(energy.sum())
    return float(energy[rank:].sum()) / total if total > 0 else 0.0


def surface_codes(surface: Surfaces) -> Ints:
    """int64 codes of surface names, [1] for a single name; raises DataError for a name that is none."""
    names = pa.array([surface]) if isinstance(surface, str) else surface
    if not isinstance(names, pa.Array | pa.ChunkedArray):
        names = pa.array(names)
    found = pc.index_in(names.cast(pa.string()), value_set=pa.array(m.SURFACES, pa.string()))
    if found.null_count:
        bad = names.filter(pc.is_null(found))[0].as_py()
        raise DataError(f"unknown surface {bad!r}: expected one of {', '.join(m.SURFACES)}")
    return np.asarray(
        found.to_numpy(zero_copy_only=False) if isinstance(found, pa.Array) else found.to_numpy(), np.int64
    )


def _column(name: str, values: NDArray[np.integer], n: int, bound: int | None = None) -> Ints:
    values = np.atleast_1d(values)
    if values.ndim != 1 or len(values) not in (1, n) or values.dtype.kind not in "iu":
        raise DataError(f"{name} must be {n} integers or one, got {values.dtype} of shape {values.shape}")
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    if low < 0 or (bound is not None and high >= bound):
        raise DataError(f"{name} must lie in 0..{'' if bound is None else bound - 1}, got values from {low} to {high}")
    return np.broadcast_to(values.astype(np.int64), (n,))


def _sigmoid(logit: Doubles) -> Doubles:
    return 1.0 / (1.0 + np.exp(-logit))
