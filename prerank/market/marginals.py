"""The numbers of the simulated ad market: who visits when, how skewed things are, what drives a click where.

Each constant names its source, or says that it was chosen. It does not know how the numbers are used.
`docs/market.md` has the same list as a table.
"""

from dataclasses import dataclass
from typing import Final

GENERATOR_VERSION: Final = 1

# Mean over the 114 regions of the traffic-share table of BAT, the auto-bidding benchmark of Avito (MIT licence,
# arXiv:2505.08485), scaled to mean 1 over the day. `dow` 1 of that table is taken to be Monday.
HOUR_SHAPE_WEEKDAY: Final = (
    0.334, 0.223, 0.185, 0.197, 0.247, 0.338, 0.488, 0.710, 1.065, 1.460, 1.698, 1.759,
    1.745, 1.717, 1.666, 1.603, 1.510, 1.396, 1.291, 1.180, 1.045, 0.891, 0.728, 0.522,
)  # fmt: skip
HOUR_SHAPE_WEEKEND: Final = (
    0.370, 0.252, 0.204, 0.209, 0.247, 0.329, 0.462, 0.672, 1.000, 1.386, 1.678, 1.758,
    1.743, 1.712, 1.650, 1.583, 1.509, 1.411, 1.307, 1.195, 1.055, 0.935, 0.765, 0.568,
)  # fmt: skip
DAY_SHAPE: Final = (1.079, 1.228, 1.026, 1.007, 0.960, 0.859, 0.840)  # Monday .. Sunday, same source

# Chosen. Offsets are winter time in whole hours; a country with several zones has one.
COUNTRIES: Final = ("US", "BR", "ID", "MX", "GB", "DE", "JP", "FR", "TR", "ES", "PL", "CA")
COUNTRY_SHARES: Final = (0.26, 0.12, 0.11, 0.08, 0.08, 0.07, 0.07, 0.06, 0.05, 0.04, 0.03, 0.03)
UTC_OFFSET_HOURS: Final = (-5, -3, 7, -6, 0, 1, 9, 1, 3, 1, 1, -5)
LANGUAGES: Final = ("en", "pt", "id", "es", "en", "de", "ja", "fr", "tr", "es", "pl", "en")
AGE_BANDS: Final = ("18-24", "25-34", "35-44", "45-54", "55-64", "65+")
AGE_SHARES: Final = (0.16, 0.26, 0.22, 0.17, 0.11, 0.08)
GENDERS: Final = ("female", "male", "other")
GENDER_SHARES: Final = (0.50, 0.48, 0.02)
DEVICES: Final = ("android", "ios", "desktop", "tablet")
DEVICE_SHARES: Final = (0.46, 0.29, 0.20, 0.05)
FORMATS: Final = ("image", "video", "carousel", "text")
FORMAT_SHARES: Final = (0.45, 0.25, 0.18, 0.12)
NULL_SHARE: Final = {"age_band": 0.06, "gender": 0.09, "language": 0.02, "quality": 0.03}

# Impressions a user in KuaiRand-Pure (CC BY-SA 4.0, Gao et al., CIKM 2022): the log of the count has deviation 0.92.
ACTIVITY_SIGMA: Final = 0.92

# Products a manufacturer in Complete Journey (CC0 as its package states): mean 14.3, median 2, and between rank 10 and
# rank 1000 the count falls as rank^-0.98. The shift that flattens the first ranks was chosen: the first one there is
# the retailer's own label.
ADS_PER_ADVERTISER: Final = 14
ADVERTISER_ZIPF: Final = 0.98
ADVERTISER_ZIPF_SHIFT: Final = 4
# Unit prices in Complete Journey: log deviation 0.92 within a department. The medians a category were chosen.
PRICE_SIGMA: Final = 0.92
PRICE_MEDIAN_RANGE_USD: Final = (3.0, 300.0)
# Mean cost of a click on the Google display network, US, as WordStream published it: 0.63 USD, taken as the median.
# Log-normal values are the assumption of Ostrovsky and Schwarz, "Reserve Prices in Internet Advertising Auctions"
# (2009); the deviations were chosen.
BID_MEDIAN_MICROS: Final = 630_000.0
BID_SIGMA_ADVERTISER: Final = 0.5
BID_SIGMA_CAMPAIGN: Final = 0.5
BID_SIGMA_CATEGORY: Final = 0.4
BID_SIGMA_DAY: Final = 0.1

# Chosen.
NUM_CATEGORIES: Final = 64
NUM_SEGMENTS: Final = 256
SEGMENT_SIGMA: Final = 1.0
LATENT_DIM: Final = 16
MAX_INTERESTS: Final = 4
MAX_VISITED: Final = 6
VISIT_KNOWN_SHARE: Final = 0.85
STARTED_BEFORE_SHARE: Final = 0.8
STARTED_BEFORE_DAYS: Final = 60
BUDGET_SIGMA: Final = 0.9
EXPECTED_CLICK_RATE: Final = 0.03
PROPENSITY_SIGMA: Final = 0.3


@dataclass(frozen=True, slots=True)
class SurfaceLaw:
    """What drives a click on one surface: the coefficients of the true logit, all chosen.

    The bases were set so that the click rates of the log come out at about 3 % (feed), 6 % (search), 2 % (story) and
    1 % (partner): the order of the 3.17 % (search) and 0.46 % (display) that WordStream published for US accounts,
    raised for the weaker ones so that a small log holds enough clicks to learn from.
    """

    name: str
    share: float  # of requests
    slots: int  # ads shown a request
    base: float
    taste: float  # user taste . ad content, gains differ by surface
    affinity: float  # segment x advertiser
    visited: float  # the user has visited the advertiser's site
    quality: float
    price: float  # per deviation of the log price within its category, subtracted
    views: float  # fatigue, per log(1 + earlier views of the advertiser), subtracted
    clicks: float  # per log(1 + earlier clicks on the advertiser)
    position: float  # per log(1 + position), subtracted
    hour_swing: float
    hour_peak: int  # local hour of the highest click rate
    device: tuple[float, float, float, float]  # as DEVICES
    format: tuple[float, float, float, float]  # as FORMATS
    conversion_base: float


SURFACE_LAWS: Final = (
    SurfaceLaw(
        name="feed", share=0.50, slots=4, base=-5.60, taste=0.80, affinity=0.70, visited=1.10, quality=0.30,
        price=0.05, views=0.30, clicks=0.90, position=0.20, hour_swing=0.15, hour_peak=21,
        device=(0.1, 0.0, -0.3, 0.0), format=(0.0, 0.25, 0.15, -0.5), conversion_base=-4.4,
    ),
    SurfaceLaw(
        name="search", share=0.22, slots=3, base=-3.85, taste=0.45, affinity=0.45, visited=0.60, quality=0.60,
        price=0.30, views=0.05, clicks=0.50, position=0.55, hour_swing=0.05, hour_peak=11,
        device=(-0.1, 0.0, 0.25, 0.0), format=(0.0, -0.4, 0.1, 0.3), conversion_base=-3.5,
    ),
    SurfaceLaw(
        name="story", share=0.18, slots=2, base=-6.60, taste=1.10, affinity=0.50, visited=0.40, quality=0.20,
        price=0.00, views=0.55, clicks=0.70, position=0.10, hour_swing=0.30, hour_peak=22,
        device=(0.2, 0.3, -1.0, -0.2), format=(0.0, 0.7, -0.2, -1.0), conversion_base=-4.9,
    ),
    SurfaceLaw(
        name="partner", share=0.10, slots=2, base=-6.20, taste=0.30, affinity=0.80, visited=1.50, quality=0.35,
        price=0.15, views=0.15, clicks=1.10, position=0.05, hour_swing=0.10, hour_peak=14,
        device=(0.3, -0.1, -0.2, 0.1), format=(0.1, 0.0, 0.0, -0.1), conversion_base=-4.5,
    ),
)  # fmt: skip
SURFACES: Final = tuple(law.name for law in SURFACE_LAWS)
