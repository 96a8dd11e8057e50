import pytest

from prerank.serve.device_buckets import Buckets
from prerank.serve.device_times import Backlog, Times


def test_own_time_is_cautious_and_a_share_is_the_median_of_the_latest():
    times = Times(Buckets((10, 20)))
    for n in range(100):
        times.note(10, 2, n / 1000)
    assert times.own_s(3) == pytest.approx(0.036 + int(0.9 * 63) / 1000)  # of the latest 64, 36 to 99
    assert times.share_s(3) == pytest.approx(0.092 / 2)  # of the latest 16, 84 to 99
    assert times.own_s(11) == times.share_s(11) == 0.0


def test_what_is_cut_takes_as_often_the_largest_size_as_it_has_pieces():
    times = Times(Buckets((10, 20)))
    times.note(20, 1, 0.5)
    assert (times.own_s(20), times.own_s(21), times.share_s(60)) == (0.5, 1.0, 1.5)


def test_a_backlog_adds_up_and_is_never_less_than_nothing():
    backlog = Backlog()
    for seconds in (0.1, 0.2, -0.1, -0.2, -1e-9):
        backlog.add(seconds)
    assert backlog.seconds == 0.0
    backlog.add(2.0)
    assert backlog.seconds == pytest.approx(2.0)
