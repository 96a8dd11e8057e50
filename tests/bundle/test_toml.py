import tomllib
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from prerank.bundle.toml import to_toml
from prerank.config import load_config, parse_config
from tests.bundle import world

text = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.one_of(text, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))
plain = st.one_of(scalars, st.lists(scalars, max_size=3))
tables = st.recursive(
    st.dictionaries(text, plain, max_size=3), lambda t: st.dictionaries(text, st.one_of(plain, t), max_size=3)
)


@given(tables)
def test_toml_reads_back_as_what_was_written(table):
    assert tomllib.loads(to_toml(table)) == table


def test_a_configuration_survives_the_round_trip():
    for settings in (world.config(), load_config(Path(__file__).parents[2] / "funnel.toml")):
        assert parse_config(tomllib.loads(to_toml(settings.to_dict())), "again") == settings


def test_none_is_left_out():
    assert to_toml({"a": None, "t": {"x": {"lo": None, "hi": 1.0}}}) == "[t]\nx = { hi = 1.0 }\n"


def test_it_reads_as_a_person_would_write_it():
    lines = to_toml(replace(world.config(), name="demo").to_dict()).splitlines()
    assert lines[0] == 'name = "demo"'
    assert "[features.user]" in lines
    assert any(line.startswith('country = { kind = "category", column = "", dim = 4') for line in lines)
    assert "targets = { is_click = 1.0 }" in lines
