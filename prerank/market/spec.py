"""The arguments of a simulated market, checked; and the record of them that `market.json` keeps."""

import json
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from pathlib import Path

from prerank.errors import DataError
from prerank.market import marginals as m


@dataclass(frozen=True, slots=True)
class MarketSpec:
    """The resolved arguments of a market: everything that decides its content."""

    num_ads: int
    seed: int
    num_users: int
    num_impressions: int
    days: int
    first_day: str

    @property
    def first_ms(self) -> int:
        """Midnight UTC of the first day, in milliseconds since 1970."""
        day = date.fromisoformat(self.first_day)
        return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1000

    @property
    def num_advertisers(self) -> int:
        """Advertisers of the market; the first are the largest."""
        return max(8, self.num_ads // m.ADS_PER_ADVERTISER)


def resolve_spec(
    num_ads: int, seed: int, num_users: int | None, num_impressions: int | None, days: int, first_day: str
) -> MarketSpec:
    """The spec with defaults filled in; raises DataError for an argument out of range.

    Impressions grow as the fourth root of the ads (600,000 at 100,000 ads, 1,067,000 at a million) and there are 30 a
    user, so that every size of market knows its users equally well.
    """
    _check("num_ads", num_ads, 100, 20_000_000)
    _check("seed", seed, 0, 2**63 - 1)
    _check("days", days, 1, 366)
    if num_impressions is None:
        num_impressions = 1000 * round(600 * (num_ads / 100_000) ** 0.25)
    _check("num_impressions", num_impressions, 1, 2_000_000_000)
    if num_users is None:
        num_users = max(100, num_impressions // 30)
    _check("num_users", num_users, 10, 100_000_000)
    try:
        date.fromisoformat(first_day)
    except (ValueError, TypeError):
        raise DataError(f"first_day must be a day such as 2026-01-05, got {first_day!r}: write YYYY-MM-DD") from None
    return MarketSpec(num_ads, seed, num_users, num_impressions, days, first_day)


def read_record(market: Path) -> tuple[MarketSpec, list[float]]:
    """The arguments and the probes recorded in `market.json`; raises DataError where they cannot be used."""
    path = market / "market.json"
    if not path.is_file():
        raise DataError(f"no {path}: this is not a complete simulated market; write one with `prerank market`")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, args = record["generator_version"], record["arguments"]
        values = [args[field.name] for field in fields(MarketSpec)]
        probes = [float(p) for p in record["probes"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not the record of a market ({error!r}): generate the market again") from error
    if version != m.GENERATOR_VERSION:
        raise DataError(
            f"{path} was written by market generator {version}, this is generator {m.GENERATOR_VERSION} and its truth "
            "differs: generate the market again"
        )
    return resolve_spec(*values), probes


def _check(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise DataError(f"{name} must be an integer from {low} to {high}, got {value!r}: choose one in that range")
