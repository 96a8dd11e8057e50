"""A funnel file that exists as a Config has names that meet; one that does not says everything that is wrong."""

import re
import tomllib
from pathlib import Path

import pytest

from prerank.bundle.toml import to_toml
from prerank.config import DiversityRule, Rules, StageLimit, TargetingRule, UtilityTerm, load_config, parse_config
from prerank.errors import ConfigError
from prerank.schema import Counter, FeatureSchema

ROOT = Path(__file__).parent.parent
FUNNELS = [ROOT / "funnel.toml", *sorted((ROOT / "examples").glob("*/funnel.toml"))]

GOOD = """
name = "tiny"
[data]
impressions = "log.parquet"
items = "items.parquet"
users = "users.parquet"
train = ["2022-04-25", "2022-05-02"]
validate = ["2022-05-03", "2022-05-03"]
test = ["2022-05-04", "2022-05-04"]
[features.user]
clicks = { kind = "history", of = "item_id", events = "is_click" }
[features.item]
item_id = { kind = "category" }
bid = { kind = "value" }
[tasks]
click = { label = "is_click" }
[retrieval]
relevant = "is_click"
targets = { is_click = 1.0 }
[utility]
click = { value = "bid" }
[validate]
golden = { at_least = 1.0 }
"""


def problems_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tomllib.loads(text), where="funnel.toml")
    return str(caught.value)


@pytest.mark.parametrize("path", FUNNELS, ids=lambda p: p.parent.name)
def test_every_shipped_funnel_file_is_good(path):
    assert load_config(path).name


def test_a_config_survives_its_own_dictionary():
    config = parse_config(tomllib.loads(GOOD), where="funnel.toml")
    without_none = _drop_none(config.to_dict())
    assert parse_config(without_none, where="again") == config


def _drop_none(plain):
    if isinstance(plain, dict):
        return {key: _drop_none(value) for key, value in plain.items() if value is not None}
    return plain


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("relevant", "relevnt"), r'retrieval.relevnt: unknown key; did you mean "relevant"?'),
        (("relevant", "relevnt"), "retrieval.relevant: missing; expected text in quotes"),
        (('"category"', '"categry"'), 'item_id.kind: expected one of'),
        (('"category"', '"categry"'), 'did you mean "category"?'),
        (('kind = "category"', "kind = []"), "item_id.kind: expected one of"),
        (('name = "tiny"', "name = 3"), "name: expected text in quotes, got 3"),
        (('name = "tiny"', 'name = "tiny"\nsede = 3'), 'sede: unknown key; did you mean "seed"?'),
        (('name = "tiny"', 'name = "tiny"\nseed = true'), "seed: expected a whole number, got True"),
        (('"2022-05-03", "2022-05-03"', '"2022-05-03"'), "data.validate: expected 2 entries, got 1"),
        (('"2022-05-03", "2022-05-03"', '"2022-05-03", "soon"'), "data.validate: expected two ISO days"),
        (('"2022-05-03", "2022-05-03"', '"2022-05-03", "2022-05-04"'), "data.test: starts on 2022-05-04, not after"),
        (('"2022-04-25", "2022-05-02"', '"2022-05-02", "2022-04-25"'), "data.train: the first day 2022-05-02 is after"),
        (("[features.user]", 'timezone = "Asia/Shangai"\n[features.user]'), "data.timezone: expected an IANA name"),
        (('value = "bid"', 'value = "bit"'), 'utility.click.value: expected a value of [features.item] or a number'),
        (('value = "bid"', 'value = "bit"'), 'did you mean "bid"?'),
        (('click = { value', 'clik = { value'), 'utility.clik: expected a task of [tasks] (click)'),
        (("golden", "goldn"), 'validate.goldn: expected a gate'),
        (("at_least = 1.0", ""), "validate.golden: expected at_least, at_most, or both"),
        (("at_least = 1.0", "at_least = nan"), "validate.golden.at_least: expected a finite number"),
        (("at_least = 1.0", "not_below_live_by = 0.1"), "validate.golden.not_below_live_by: expected at_least or"),
        (("golden = { at_least = 1.0 }", "latency_ms = { at_most_of_live = -2 }"),
         "validate.latency_ms.at_most_of_live: expected a finite number, 0 or more against live, got -2"),
        (("golden = { at_least = 1.0 }", "embedding_drift = { not_above_live_by = 0.1 }"),
         "validate.embedding_drift.not_above_live_by: expected at_least or at_most: this gate is already against live"),
        (("golden = { at_least = 1.0 }", "kl_loss = { at_most = 0.1 }"),
         "validate.kl_loss: expected a [heavy_ranker] in the funnel file"),
        (("{ is_click = 1.0 }", "{}"), "retrieval.targets: expected the weight of at least one event"),
        (("{ is_click = 1.0 }", "{ is_click = 0 }"), "retrieval.targets.is_click: expected a weight above 0"),
        (('relevant = "is_click"', 'relevant = "is_click"\ndim = 0'), "retrieval.dim: expected more than 0, got 0"),
        (('relevant = "is_click"', 'relevant = "is_click"\ndropout = 1'), "retrieval.dropout: expected at least 0"),
        (('relevant = "is_click"', 'relevant = "is_click"\nloss = "sofmax"'), 'did you mean "softmax"?'),
        *(
            (('relevant = "is_click"', f'relevant = "is_click"\nloss = "{loss}"\n{key} = 8'),
             f'retrieval.{key}: expected none with loss = "{loss}", only "sampled_softmax" has them; got 8')
            for key in ("uniform_negatives", "cached_batches")
            for loss in ("softmax", "in_batch_softmax")
        ),
        *(
            (('relevant = "is_click"', f'relevant = "is_click"\nloss = "sampled_softmax"\n{key} = -1'),
             f"retrieval.{key}: expected 0 or more, got -1")
            for key in ("uniform_negatives", "cached_batches")
        ),
        (('of = "item_id"', 'of = "bid"'), "features.user.clicks.of = 'bid': expected a category of [features.item]"),
        (('of = "item_id"', 'of = "item_id", length = 0'), "features.user.clicks.length = 0: expected at least 1"),
        (('item_id = { kind = "category" }', 'item_id = 3'), "features.item.item_id: expected { kind = ... }"),
        (('kind = "category"', 'kind = "category", hash = 9, min_count = 2'), "hash and min_count do not go together"),
        (('kind = "value"', 'kind = "value", missing = nan'), "features.item.bid.missing = nan: expected a finite"),
        (("[features.item]", 'x = { kind = "category" }\n[features.context]\nx = { kind = "category" }\n'
          "[features.item]"), "the name is taken by features.user.x"),
        (("[features.item]", '[features.context]\nx = { kind = "value" }\n[features.item]'),
         "features.context.x: a context feature is a category, number or bag, not value"),
        (("bid = {", '"b.id" = {'), "features.item.'b.id': expected a name without dots"),
        *(
            (("[utility]", f"[ranker]\n{key} = 0\n[utility]"), f"ranker.{key}: expected more than 0, got 0")
            for key in ("width", "experts", "cross_layers", "low_rank", "heads")
        ),
        (("[utility]", '[ranker]\nmodel = "mtmd"\nexperts = 2.5\n[utility]'),
         "ranker.experts: expected a whole number, got 2.5"),
        (("[utility]", '[ranker]\nmodel = "mmoe"\n[utility]'),
         "ranker.model: expected one of ['two_tower', 'mtmd', 'mmoe_dcn', 'cross_feature'], got 'mmoe'; "
         'did you mean "mmoe_dcn"?'),
        (("[utility]", '[ranker]\ncrossings = ["matches", "atention"]\n[utility]'),
         "ranker.crossings[1]: expected one of ['attention', 'matches'], got 'atention'; did you mean \"attention\"?"),
        (("[utility]", '[ranker]\ncrossings = "matches"\n[utility]'), "ranker.crossings: expected a list of"),
        (("[utility]", '[ranker]\nmodel = "mtmd"\ndomain = "tab"\n[utility]'),
         "ranker.domain: expected a category of [features.context] (there is none), got 'tab'"),
        (("[utility]", '[features.context]\ntab = { kind = "category" }\nage = { kind = "number" }\n'
          '[ranker]\nmodel = "mtmd"\ndomain = "tap"\n[utility]'),
         "ranker.domain: expected a category of [features.context] (tab), got 'tap'; did you mean \"tab\"?"),
        (("[utility]", '[features.context]\nage = { kind = "number" }\n[ranker]\nmodel = "mtmd"\ndomain = "age"\n'
          "[utility]"), "ranker.domain: expected a category of [features.context] (there is none), got 'age'"),
        (("[utility]", '[features.context]\ntab = { kind = "category" }\n[ranker]\ndomain = "tab"\n[utility]'),
         'ranker.domain: expected none with model = "two_tower", only "mtmd" has domains; got \'tab\''),
        (('value = "bid" }', 'value = "bid", given = ["buy"] }'),
         "utility.click.given: expected another task of [tasks] (there is none), got 'buy'"),
        (('value = "bid" }', 'value = "bid", given = ["click"] }'), "utility.click.given: expected another task"),
        (("[retrieval]", 'buy = { label = "b" }\n[rules]\nfloor = { bye = 0.1 }\n[retrieval]'),
         "rules.floor.bye: expected a task of [tasks] (click, buy), got 'bye'; did you mean \"buy\"?"),
        (('[retrieval]\nrelevant = "is_click"\ntargets = { is_click = 1.0 }\n[utility]\nclick = { value = "bid" }',
          'buy = { label = "b" }\n[retrieval]\nrelevant = "is_click"\ntargets = { is_click = 1.0 }\n'
          '[utility]\nclick = { value = "bid", given = ["buy", "buy"] }'),
         "utility.click.given: expected each task once, got ['buy', 'buy']"),
        (("[validate]", "[rules]\nfloor = { click = 1.5 }\n[validate]"),
         "rules.floor.click: expected a probability, 0 to 1, got 1.5"),
        (("[validate]", "[rules]\nreserve_micros = nan\n[validate]"),
         "rules.reserve_micros: expected a finite number, got nan"),
        (("[validate]", "[rules]\nreserve = 1.0\n[validate]"),
         'rules.reserve: unknown key; did you mean "reserve_micros"?'),
        (("[validate]", "[diversity]\nbrand = { at_most = 0 }\n[validate]"),
         "diversity.brand.at_most: expected 1 or more, got 0"),
        (("[validate]", "[diversity]\nbrand = { most = 1 }\n[validate]"),
         'diversity.brand.most: unknown key; did you mean "at_most"?'),
        *(
            (("[utility]", f"[targeting]\nr = {{ {options} }}\n[utility]"), f"targeting.r{expected}")
            for options, expected in (
                ('user = "u"', ".item: missing; expected text in quotes"),
                ('item = "", user = "u"', ".item: expected a column of the items table, got ''"),
                ('item = "i"', ": expected exactly one of user, context and schedule, got none"),
                ('item = "i", user = "u", context = "c"', ": expected exactly one of user, context and schedule, "
                 "got user and context"),
                ('item = "i", schedule = "Berlin"', ".schedule: expected an IANA name such as"),
                ('item = "i", user = "u", exclude = true', '.exclude: unknown key; did you mean "excludes"?'),
                ('item = "i", user = "u", excludes = 1', ".excludes: expected true or false, got 1"),
            )
        ),
        *(
            (("[validate]", f"[inventory]\nresident = {{ top = 5, by = 'bid' }}\n"
              f"[serve.stages]\n{said}\n[validate]"), f"serve.stages.{expected}")
            for said, expected in (
                ("retreive = { deadline_ms = 20 }", "retreive: expected a stage of this funnel (target, expand_user, "
                 "retrieve, fetch_tail, prepare_user, rank, describe), got 'retreive'; did you mean \"retrieve\"?"),
                ("merge = { deadline_ms = 20 }", "merge: expected a stage of this funnel (target, "),
                ("rank = {}", "rank: expected deadline_ms, at_once, or both"),
                ("rank = { deadline = 20 }", 'rank.deadline: unknown key; did you mean "deadline_ms"?'),
                ("rank = { deadline_ms = 0 }", "rank.deadline_ms: expected a finite number above 0, got 0.0"),
                ("rank = { deadline_ms = -3 }", "rank.deadline_ms: expected a finite number above 0, got -3.0"),
                ("rank = { deadline_ms = nan }", "rank.deadline_ms: expected a finite number above 0, got nan"),
                ("rank = { deadline_ms = inf }", "rank.deadline_ms: expected a finite number above 0, got inf"),
                ("rank = { at_once = 0 }", "rank.at_once: expected 1 or more, got 0"),
                ("rank = { at_once = 1.5 }", "rank.at_once: expected a whole number, got 1.5"),
                ("rank = 20", "rank: expected a table, got 20"),
            )
        ),
        (("[features.item]", "[features.itm]"), 'features.itm: unknown key; did you mean "item"?'),
    ],
)  # fmt: skip
def test_each_mistake_is_told_with_its_key(change, expected):
    assert GOOD.count(change[0]) == 1
    assert expected in problems_of(GOOD.replace(*change))


def test_the_limits_of_the_docs_are_limits():
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "serve.md").read_text(), flags=re.DOTALL)
    (block,) = [one for one in blocks if "[serve.stages]" in one]
    new = 'new = { kind = "list", items = [1], quota = 1 }'
    config = parse_config(tomllib.loads(f"{GOOD}\n[generators]\n{new}\n{block}"), where="docs")
    assert config.serve.stages["rank"] == StageLimit(deadline_ms=40.0, at_once=2)
    assert config.serve.stages["generate_new"] == StageLimit(deadline_ms=5.0)
    assert parse_config(tomllib.loads(to_toml(config.to_dict())), where="again") == config


def test_the_rules_of_the_docs_are_rules():
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "rules.md").read_text(), flags=re.DOTALL)
    buy = 'purchase = { label = "is_bought" }\n[retrieval]'
    value = 'purchase_value = { kind = "value" }\nbid_micros = { kind = "value" }\n[tasks]'
    text = GOOD.replace('[utility]\nclick = { value = "bid" }', block)
    text = text.replace("[retrieval]", buy).replace("[tasks]", value)
    config = parse_config(tomllib.loads(text), where="docs")
    assert config.utility["purchase"] == UtilityTerm("purchase_value", given=("click",))
    assert config.rules == Rules(100.0, {"click": 0.01})
    assert list(config.diversity.items()) == [("advertiser_id", DiversityRule(5)), ("creative_id", DiversityRule(1))]


def test_targeting_rules_are_read_in_order_and_say_whose_columns_they_read():
    rules = """
[targeting]
country = { user = "country", item = "countries" }
blocked = { user = "country", item = "blocked", excludes = true }
placement = { context = "placement", item = "placements" }
hours = { schedule = "Europe/Berlin", item = "hours" }
"""
    config = parse_config(tomllib.loads(GOOD + rules), where="f")
    assert config.targeting == {
        "country": TargetingRule(item="countries", user="country"),
        "blocked": TargetingRule(item="blocked", user="country", excludes=True),
        "placement": TargetingRule(item="placements", context="placement"),
        "hours": TargetingRule(item="hours", schedule="Europe/Berlin"),
    }
    assert config.targeted("user") == ["country"]
    assert config.targeted("context") == ["placement"]
    assert config.targeted("item") == ["countries", "blocked", "placements", "hours"]
    assert parse_config(tomllib.loads(to_toml(config.to_dict())), where="again") == config


COUNTING = GOOD.replace(
    "[features.item]",
    """
[features.context]
tab = { kind = "category" }
slot = { kind = "number" }
place = { kind = "category", hash = 9 }
[features.interaction]
lately = { count = "is_like", by = "tags", window = "1h", length = 20 }
few = { on = "tab", last = 5 }
[features.item]
tags = { kind = "bag" }
""",
)


def counter_of(options: str):
    return parse_config(tomllib.loads(COUNTING.replace("last = 5", options)), where="f").features.interaction["few"]


def test_counters_are_read_and_their_labels_are_the_funnels():
    config = parse_config(tomllib.loads(COUNTING), where="f")
    assert config.features.interaction == {
        "lately": Counter(count="is_like", by="tags", window="1h", length=20),
        "few": Counter(count="impression", on="tab", last=5),
    }
    assert config.labels() == ["is_click", "is_like"]
    assert config.features.events() == ["is_click", "is_like", "impression"]
    assert config.features.request_features() == ["clicks", "tab", "slot", "place", "lately", "few"]
    assert parse_config(_drop_none(config.to_dict()), where="again") == config


def test_without_counters_there_are_none():
    assert parse_config(tomllib.loads(GOOD), where="f").features.interaction == {}


@pytest.mark.parametrize(
    ("window", "ms"),
    [("1s", 1_000), ("90s", 90_000), ("30m", 1_800_000), ("1h", 3_600_000), ("7d", 604_800_000)],
)
def test_a_window_is_a_whole_number_of_seconds_minutes_hours_or_days(window, ms):
    assert counter_of(f'window = "{window}"').window_ms == ms


@pytest.mark.parametrize(
    "window", ["1 h", "h", "0h", "-1h", "1.5h", "1w", "60", "01h", "1H", "1h ", "1h\\n", "1000000d"]
)
def test_a_window_that_is_no_duration_is_told(window):
    found = problems_of(COUNTING.replace("last = 5", f'window = "{window}"'))
    assert found.startswith("funnel.toml: features.interaction.few.window = ")
    assert found.endswith('expected a duration such as "90s", "30m", "1h" or "7d"')


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ((", last = 5", ""), "few: expected a window (a duration) or last (a number of impressions), one of the two, "
         "got window = '' and last = 0"),
        (("last = 5", 'last = 5, window = "1h"'), "few: expected a window (a duration) or last (a number of "
         "impressions), one of the two, got window = '1h' and last = 5"),
        (("last = 5", "last = -5"), "one of the two, got window = '' and last = -5"),
        (("last = 5", 'last = "5"'), "few.last: expected a whole number, got '5'"),
        (("last = 5", "last = 5, length = 0"), "few.length = 0: expected at least 1"),
        (('by = "tags"', 'by = "bid"'),
         "lately.by = 'bid': expected a category or bag of [features.item], one of ['tags', 'item_id']"),
        (('by = "tags"', 'by = "tab"'),
         "lately.by = 'tab': expected a category or bag of [features.item], one of ['tags', 'item_id']"),
        (('on = "tab"', 'on = "slot"'),
         "few.on = 'slot': expected a category of [features.context] without hash, one of ['tab']"),
        (('on = "tab"', 'on = "place"'),
         "few.on = 'place': expected a category of [features.context] without hash, one of ['tab']"),
        (('on = "tab"', 'on = "tags"'),
         "few.on = 'tags': expected a category of [features.context] without hash, one of ['tab']"),
        (("last = 5", "last = 5, share = true"), "few: share = true: expected a label to count, such as count = "
         "\"is_click\", and no `by`, got count = 'impression' and by = ''; a share is a label's among all impressions"),
        (("length = 20", "share = true"), "lately: share = true: expected a label to count, such as count = "
         "\"is_click\", and no `by`, got count = 'is_like' and by = 'tags'"),
        (("last = 5", "last = 5, share = 3"), "few.share: expected true or false, got 3"),
        (("few = {", "clicks = {"), "clicks: the name is taken by features.user.clicks; choose another"),
        (("few = {", "tab = {"), "tab: the name is taken by features.context.tab; choose another"),
        (("few = {", "item_id = {"), "item_id: the name is taken by features.item.item_id; choose another"),
        (("few = {", '"f.ew" = {'), "'f.ew': expected a name without dots"),
        (("few = {", "few = 3 # {"), "few: expected { count = ..., by = ..., window = ... }, got 3"),
        (("last = 5", 'windw = "1h"'), 'few.windw: unknown key; did you mean "window"?'),
        (("last = 5", 'last = 5, kind = "history"'), "few.kind: unknown key"),
        (("[features.interaction]", "[features.interactions]"),
         'features.interactions: unknown key; did you mean "interaction"?'),
        (("last = 5", 'lst = 5, cont = "is_like"'), 'few.lst: unknown key; did you mean "last"?'),
        (("last = 5", 'lst = 5, cont = "is_like"'), 'few.cont: unknown key; did you mean "count"?'),
    ],
)  # fmt: skip
def test_each_mistake_in_a_counter_is_told_with_its_key(change, expected):
    assert COUNTING.count(change[0]) == 1
    assert expected in problems_of(COUNTING.replace(*change))
    prefix = "features." if "interactions" in expected else "features.interaction."
    assert all(line.startswith(f"funnel.toml: {prefix}") for line in problems_of(COUNTING.replace(*change)).split("\n"))


def test_the_features_are_four_tables():
    start, rest = GOOD.split("[features.user]")
    found = problems_of(start.replace("[data]", "features = 3\n[data]") + "[tasks]" + rest.split("[tasks]")[1])
    assert "features: expected tables ['user', 'context', 'item', 'interaction'], got 3" in found


def test_a_counter_that_differs_is_the_first_difference():
    config = parse_config(tomllib.loads(COUNTING), where="f")
    other = parse_config(tomllib.loads(COUNTING.replace("last = 5", "last = 6")), where="f")
    assert "interaction feature 'few': count=impression, by=, on=tab, window=, last=5" in str(
        config.features.first_difference(other.features)
    )
    without = parse_config(tomllib.loads(GOOD), where="f").features
    more = FeatureSchema(without.user, without.context, without.item, {"few": Counter(last=5)})
    assert str(without.first_difference(more)).startswith("interaction feature 'few': absent here, count=impression")


def test_a_domain_that_is_a_context_category_is_taken():
    tab = '[features.context]\ntab = { kind = "category" }\n[ranker]\nmodel = "mtmd"\ndomain = "tab"\n[utility]'
    assert parse_config(tomllib.loads(GOOD.replace("[utility]", tab)), where="f").ranker.domain == "tab"


def test_every_mistake_is_told_at_once():
    found = problems_of(GOOD.replace("relevant", "relevnt").replace('"category"', '"categry"')).splitlines()
    assert len(found) == 3
    assert all(line.startswith("funnel.toml: ") for line in found)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such funnel file"):
        load_config(tmp_path / "funnel.toml")
    (tmp_path / "funnel.toml").write_text("name = ")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "funnel.toml")


def test_a_schema_survives_its_own_dictionary_and_names_its_first_difference():
    schema = parse_config(tomllib.loads(GOOD), where="f").features
    again = FeatureSchema.from_dict(schema.to_dict())
    assert again == schema
    assert schema.first_difference(again) is None
    wider = parse_config(tomllib.loads(GOOD.replace('"category"', '"category", dim = 4')), where="f").features
    assert "item feature 'item_id': kind=category" in str(schema.first_difference(wider))
    more = parse_config(tomllib.loads(GOOD.replace("bid = ", 'x = { kind = "number" }\nbid = ')), where="f").features
    assert str(schema.first_difference(more)) == "item feature 'x': absent here, kind=number, column=, log=False there"


def test_labels_are_each_named_once():
    assert parse_config(tomllib.loads(GOOD), where="f").labels() == ["is_click"]
