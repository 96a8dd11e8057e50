from collections.abc import Callable
from dataclasses import dataclass

import pytest
import structlog

from prerank.errors import DeadlineExceeded, GraphError, RequestError
from prerank.serve.graph import Deadline, RequestGraph, Stage, Values


class Clock:
    """Seconds that pass only when a stage says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Step:
    name: str
    reads: frozenset[str]
    writes: frozenset[str]
    work: Callable[[Values], Values]

    def run(self, values: Values) -> Values:
        return self.work(values)

    def count(self, values: Values, written: Values) -> tuple[int, int]:
        return len(values), len(written)


def step(name: str, reads: str, writes: str, work: Callable[[Values], Values] | None = None) -> Step:
    """A stage that writes "name(what it read)" under each of its names, unless told to do otherwise."""
    names = frozenset(writes.split())

    def told(values: Values) -> Values:
        read = ",".join(f"{values[n]}" for n in sorted(values))
        return dict.fromkeys(names, f"{name}({read})")

    return Step(name, frozenset(reads.split()), names, work or told)


def graph(*stages: Stage, clock: Clock | None = None, **fallbacks: Stage) -> RequestGraph:
    return RequestGraph(
        stages,
        inputs=frozenset({"request"}),
        outputs=frozenset({"out"}),
        answer="out",
        fallbacks=fallbacks,
        clock=clock or Clock(),
    )


def fails(_: Values) -> Values:
    raise ValueError("a stage broke")


def test_stages_run_by_what_they_read_not_by_where_they_stand() -> None:
    wired = graph(step("c", "b_value a_value", "out"), step("b", "a_value", "b_value"), step("a", "request", "a_value"))
    assert [stage.name for stage in wired.order] == ["a", "b", "c"]
    assert wired.waits_for == {"a": frozenset(), "b": {"a"}, "c": {"a", "b"}}
    run = wired.run({"request": "r"})
    assert run.outputs == {"out": "c(a(r),b(a(r)))"}
    assert not run.degraded


def test_stages_that_need_nothing_of_each_other_wait_for_nothing_of_each_other() -> None:
    wired = graph(step("left", "request", "l"), step("right", "request", "r"), step("join", "l r", "out"))
    assert wired.waits_for["left"] == wired.waits_for["right"] == frozenset()


def test_every_stage_is_timed_and_counted_in_the_order_it_ran() -> None:
    clock = Clock()

    def slow(values: Values) -> Values:
        clock.now += 0.25
        return {"a_value": 1}

    run = graph(step("b", "a_value request", "out"), step("a", "request", "a_value", slow), clock=clock).run(
        {"request": 0}
    )
    assert [(r.name, r.ms, r.num_in, r.num_out) for r in run.reports] == [("a", 250.0, 1, 1), ("b", 0.0, 2, 1)]


def test_a_stage_sees_only_what_it_declares() -> None:
    seen: list[set[str]] = []

    def look(values: Values) -> Values:
        seen.append(set(values))
        return {"out": 1}

    graph(step("a", "request", "a_value"), step("b", "a_value", "out", look)).run({"request": 0})
    assert seen == [{"a_value"}]


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([step("a", "nothing", "out")], "stage 'a' reads 'nothing', which no stage writes and no input gives"),
        (
            [step("a", "request", "out"), step("b", "request", "out")],
            "'out' is written twice: by stage 'a' and by stage 'b'",
        ),
        ([step("a", "", "request out")], "'request' is written twice: by an input and by stage 'a'"),
        ([step("a", "y", "x"), step("b", "x", "y out")], "in a circle: '[ab]' -> '[ab]' -> '[ab]'"),
        ([step("a", "out", "out")], "in a circle: 'a' -> 'a'"),
        ([step("a", "request", "x")], r"output 'out': no stage writes it; stages write \['x'\]"),
        ([step("a", "request", "out"), step("a", "request", "y")], "two stages are called 'a'"),
    ],
)
def test_a_wiring_that_cannot_work_is_refused_by_name(stages: list[Stage], says: str) -> None:
    with pytest.raises(GraphError, match=says):
        graph(*stages)


@pytest.mark.parametrize(
    ("fallback", "says"),
    [
        ({"b": step("f", "request", "out")}, r"fallback 'f' is for 'b', which is no stage; stages: \['a'\]"),
        ({"a": step("f", "request", "other")}, r"fallback 'f' writes \['other'\], and stage 'a' .* writes \['out'\]"),
        ({"a": step("f", "nothing", "out")}, "stage 'f' reads 'nothing', which no stage writes"),
    ],
)
def test_a_fallback_that_cannot_work_is_refused_by_name(fallback: dict[str, Stage], says: str) -> None:
    with pytest.raises(GraphError, match=says):
        graph(step("a", "request", "out"), **fallback)


def test_a_stage_waits_for_what_its_fallback_reads() -> None:
    wired = graph(step("rank", "request", "out"), step("find", "request", "found"), rank=step("f", "found", "out"))
    assert [stage.name for stage in wired.order] == ["find", "rank"]


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({}, r"stage 'a' did not write \['out'\] as declared, and wrote \[\] undeclared"),
        ({"out": 1, "more": 2}, r"stage 'a' did not write \[\] as declared, and wrote \['more'\] undeclared"),
    ],
)
def test_a_stage_that_writes_other_than_it_declared_is_an_error_a_fallback_does_not_hide(
    written: Values, says: str
) -> None:
    wired = graph(step("a", "request", "out", lambda _: written), a=step("f", "request", "out"))
    with pytest.raises(GraphError, match=says):
        wired.run({"request": 0})


@pytest.mark.parametrize("given", [{}, {"request": 0, "other": 1}])
def test_a_run_is_given_the_declared_inputs(given: Values) -> None:
    with pytest.raises(GraphError, match=r"expected the inputs \['request'\], got"):
        graph(step("a", "request", "out")).run(given)


def test_a_stage_that_breaks_is_replaced_and_the_answer_says_so() -> None:
    wired = graph(step("a", "request", "out", fails), a=step("f", "request", "out"))
    with structlog.testing.capture_logs() as logs:
        run = wired.run({"request": "r"})
    assert run.outputs == {"out": "f(r)"}
    assert run.degraded
    assert run.notes == ("a: it failed (ValueError); f took its place",)
    assert [report.name for report in run.reports] == ["f"]
    assert [(log["event"], log["stage"], log["fallback"]) for log in logs] == [("stage failed", "a", "f")]


def test_a_required_stage_that_breaks_is_raised() -> None:
    with pytest.raises(ValueError, match="a stage broke"):
        graph(step("a", "request", "out", fails)).run({"request": 0})


def test_an_error_that_is_the_requests_own_answer_passes_a_fallback() -> None:
    def refuses(_: Values) -> Values:
        raise RequestError("context.hour: missing")

    with pytest.raises(RequestError, match=r"context\.hour"):
        graph(step("a", "request", "out", refuses), a=step("f", "request", "out")).run({"request": 0})


def slow_find(clock: Clock, seconds: float) -> Step:
    def find(_: Values) -> Values:
        clock.now += seconds
        return {"found": "found"}

    return step("find", "request", "found", find)


def test_a_required_stage_that_cannot_start_in_time_ends_the_request() -> None:
    clock = Clock()
    wired = graph(slow_find(clock, 0.05), step("rank", "found", "out"), clock=clock)
    assert wired.run({"request": 0}, Deadline(0.0, 50.1)).outputs == {"out": "rank(found)"}
    clock.now = 0.0
    with pytest.raises(DeadlineExceeded, match=r"rank: the deadline of 50 ms passed before it could start; allow more"):
        wired.run({"request": 0}, Deadline(0.0, 50.0))


def test_a_stage_that_cannot_start_in_time_is_replaced_by_its_fallback() -> None:
    clock = Clock()
    wired = graph(slow_find(clock, 1.0), step("rank", "found", "out"), rank=step("f", "found", "out"), clock=clock)
    run = wired.run({"request": 0}, Deadline(0.0, 50.0))
    assert run.outputs == {"out": "f(found)"}
    assert run.notes == ("rank: the deadline of 50 ms passed before it could start; f took its place",)


def test_once_an_answer_exists_what_is_left_runs_even_if_late() -> None:
    clock = Clock()
    wired = RequestGraph(
        [slow_find(clock, 1.0), step("describe", "found", "told")],
        inputs=frozenset({"request"}),
        outputs=frozenset({"told"}),
        answer="found",
        fallbacks={},
        clock=clock,
    )
    run = wired.run({"request": 0}, Deadline(0.0, 50.0))
    assert run.outputs == {"told": "describe(found)"}
    assert not run.degraded


def test_a_deadline_counts_from_when_the_request_came_not_from_when_it_ran() -> None:
    clock = Clock()
    clock.now = 10.0
    with pytest.raises(DeadlineExceeded, match="a: the deadline"):
        graph(step("a", "request", "out"), clock=clock).run({"request": 0}, Deadline(9.9, 50.0))


def test_runs_of_one_graph_share_nothing() -> None:
    wired = graph(step("a", "request", "out"))
    assert [wired.run({"request": n}).outputs["out"] for n in range(3)] == ["a(0)", "a(1)", "a(2)"]
