"""A log file says how fast long work goes and how long the rest takes."""

from io import StringIO

from rich.console import Console

from prerank.cli.progress import _Lines, progress


def told(calls: list[tuple[float, int]], total: int, unit: str) -> list[str]:
    """The lines of calls (seconds on the clock, how much is done)."""
    now = 0.0
    out = StringIO()
    lines = _Lines(Console(file=out, width=200), clock=lambda: now)
    for moment, done in calls:
        now = moment
        lines("train", done, total, unit)
    return out.getvalue().splitlines()


def test_lines_say_the_speed_since_the_work_began_and_how_long_the_rest_takes():
    lines = told([(100.0, 1_000), (105.0, 1_500), (110.0, 2_000), (130.0, 10_000)], 10_000, "examples")
    assert lines == [
        "train: 1,000 of 10,000 examples",
        "train: 2,000 of 10,000 examples, 100 examples/s, 0:01:20 left",
        "train: 10,000 of 10,000 examples, 300 examples/s",
    ]


def test_work_of_which_less_is_done_than_before_has_begun_again():
    lines = told([(0.0, 0), (50.0, 1_000), (51.0, 100), (61.0, 300)], 1_000, "examples")
    assert lines[2:] == [
        "train: 100 of 1,000 examples",
        "train: 300 of 1,000 examples, 20 examples/s, 0:00:35 left",
    ]


def test_an_unknown_total_has_a_speed_and_no_rest():
    assert told([(0.0, 0), (20.0, 80)], 0, "events") == ["train: 0 events", "train: 80 events, 4 events/s"]


def test_per_cent_have_a_rest_and_no_speed():
    assert told([(0.0, 0), (20.0, 20)], 100, "%")[1] == "train: 20 of 100 %, 0:01:20 left"


def test_work_that_does_not_move_has_neither():
    assert told([(0.0, 5), (20.0, 5)], 100, "examples")[1] == "train: 5 of 100 examples"


def test_a_bar_of_work_that_begins_again_begins_again():
    out = StringIO()
    with progress(Console(file=out, width=200, force_terminal=True)) as report:
        for done in (100, 1_000, 50):
            report("train", done, 1_000, "examples")
    assert "50/1000" in out.getvalue()
