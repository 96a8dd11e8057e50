import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import structlog

from prerank.errors import Cancelled, DataError, DeadlineExceeded, GraphError, RequestError
from prerank.kernels.stop import Stop, current
from prerank.serve.graph import Deadline, Limit, RequestGraph, Stage, Values
from prerank.serve.passage import run_graph

pytestmark = pytest.mark.alone


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


def graph(
    *stages: Stage,
    clock: Callable[[], float] | None = None,
    pool: Executor | None = None,
    limits: Mapping[str, Limit] | None = None,
    short: frozenset[str] = frozenset(),
    heeding: frozenset[str] = frozenset(),
    spare_ms: float = 0.0,
    patient: str = "",
    outputs: frozenset[str] = frozenset({"out"}),
    **fallbacks: Stage,
) -> RequestGraph:
    return RequestGraph(
        stages,
        inputs=frozenset({"request"}),
        outputs=outputs,
        answer="out",
        fallbacks=fallbacks,
        patient=frozenset(patient.split()),
        clock=clock or Clock(),
        pool=pool,
        limits=limits,
        short=short,
        heeding=heeding,
        spare_ms=spare_ms,
    )


def fails(_: Values) -> Values:
    raise ValueError("a stage broke")


def test_stages_run_by_what_they_read_not_by_where_they_stand() -> None:
    wired = graph(step("c", "b_value a_value", "out"), step("b", "a_value", "b_value"), step("a", "request", "a_value"))
    assert [stage.name for stage in wired.order] == ["a", "b", "c"]
    assert wired.waits_for == {"a": frozenset(), "b": {"a"}, "c": {"a", "b"}}
    run = run_graph(wired, {"request": "r"})
    assert run.outputs == {"out": "c(a(r),b(a(r)))"}
    assert not run.degraded


def test_a_stage_may_take_the_place_of_the_one_of_its_name_and_all_else_stays() -> None:
    fallback = step("nothing", "request", "a_value")
    limits = {"b": Limit(at_once=2)}
    wired = graph(step("a", "request", "a_value"), step("b", "a_value", "out"), a=fallback, limits=limits, patient="a")
    other = wired.with_stages([step("a", "", "a_value", lambda _: {"a_value": 7})])
    assert run_graph(other, {"request": "r"}).outputs == {"out": "b(7)"}
    assert run_graph(wired, {"request": "r"}).outputs == {"out": "b(a(r))"}
    kept = set(vars(wired)) - {"stages", "order", "turns"}
    assert {name: vars(other)[name] for name in kept} == {name: vars(wired)[name] for name in kept}
    with pytest.raises(GraphError, match=r"'c' is to take a stage's place, and is no stage; stages: \['a', 'b'\]"):
        wired.with_stages([step("c", "", "a_value")])


def test_stages_that_need_nothing_of_each_other_wait_for_nothing_of_each_other() -> None:
    wired = graph(step("left", "request", "l"), step("right", "request", "r"), step("join", "l r", "out"))
    assert wired.waits_for["left"] == wired.waits_for["right"] == frozenset()


def test_every_stage_is_timed_and_counted_in_the_order_it_ran() -> None:
    clock = Clock()

    def slow(values: Values) -> Values:
        clock.now += 0.25
        return {"a_value": 1}

    wired = graph(step("b", "a_value request", "out"), step("a", "request", "a_value", slow), clock=clock)
    run = run_graph(wired, {"request": 0})
    assert [(r.name, r.ms, r.num_in, r.num_out) for r in run.reports] == [("a", 250.0, 1, 1), ("b", 0.0, 2, 1)]


def test_a_stage_sees_only_what_it_declares() -> None:
    seen: list[set[str]] = []

    def look(values: Values) -> Values:
        seen.append(set(values))
        return {"out": 1}

    run_graph(graph(step("a", "request", "a_value"), step("b", "a_value", "out", look)), {"request": 0})
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
        run_graph(wired, {"request": 0})


@pytest.mark.parametrize("given", [{}, {"request": 0, "other": 1}])
def test_a_run_is_given_the_declared_inputs(given: Values) -> None:
    with pytest.raises(GraphError, match=r"expected the inputs \['request'\], got"):
        run_graph(graph(step("a", "request", "out")), given)


def test_a_stage_that_breaks_is_replaced_and_the_answer_says_so() -> None:
    wired = graph(step("a", "request", "out", fails), a=step("f", "request", "out"))
    with structlog.testing.capture_logs() as logs:
        run = run_graph(wired, {"request": "r"})
    assert run.outputs == {"out": "f(r)"}
    assert run.degraded
    assert run.notes == ("a: it failed (ValueError); f took its place",)
    assert [report.name for report in run.reports] == ["f"]
    assert [(log["event"], log["stage"], log["fallback"]) for log in logs] == [("stage failed", "a", "f")]


def test_a_required_stage_that_breaks_is_raised() -> None:
    with pytest.raises(ValueError, match="a stage broke"):
        run_graph(graph(step("a", "request", "out", fails)), {"request": 0})


def test_an_error_that_is_the_requests_own_answer_passes_a_fallback() -> None:
    def refuses(_: Values) -> Values:
        raise RequestError("context.hour: missing")

    with pytest.raises(RequestError, match=r"context\.hour"):
        run_graph(graph(step("a", "request", "out", refuses), a=step("f", "request", "out")), {"request": 0})


def test_what_a_store_has_or_lacks_is_no_answer_and_a_fallback_meets_it() -> None:
    def lacks(_: Values) -> Values:
        raise DataError("redis://secret: the record is damaged")

    with structlog.testing.capture_logs() as logs:
        run = run_graph(graph(step("a", "request", "out", lacks), a=step("f", "request", "out")), {"request": "r"})
    assert run.outputs == {"out": "f(r)"}
    assert run.notes == ("a: it failed (DataError); f took its place",)
    assert [(log["log_level"], log["error"]) for log in logs] == [("warning", "redis://secret: the record is damaged")]
    with pytest.raises(DataError, match="the record is damaged"):
        run_graph(graph(step("a", "request", "out", lacks)), {"request": 0})


def slow_find(clock: Clock, seconds: float) -> Step:
    def find(_: Values) -> Values:
        clock.now += seconds
        return {"found": "found"}

    return step("find", "request", "found", find)


def test_a_required_stage_that_cannot_start_in_time_ends_the_request() -> None:
    clock = Clock()
    wired = graph(slow_find(clock, 0.05), step("rank", "found", "out"), clock=clock)
    assert run_graph(wired, {"request": 0}, Deadline(0.0, 50.1)).outputs == {"out": "rank(found)"}
    clock.now = 0.0
    with pytest.raises(DeadlineExceeded, match=r"rank: the deadline of 50 ms passed before it could start; allow more"):
        run_graph(wired, {"request": 0}, Deadline(0.0, 50.0))


def test_a_stage_that_cannot_start_in_time_is_replaced_by_its_fallback() -> None:
    clock = Clock()
    wired = graph(slow_find(clock, 1.0), step("rank", "found", "out"), rank=step("f", "found", "out"), clock=clock)
    run = run_graph(wired, {"request": 0}, Deadline(0.0, 50.0))
    assert run.outputs == {"out": "f(found)"}
    assert run.notes == ("rank: the deadline of 50 ms passed before it could start; f took its place",)


def test_a_patient_stage_is_replaced_where_it_fails_and_not_where_it_is_late(pool: Executor) -> None:
    """Its fallback would be for nothing: what comes after it could not start in time either."""
    clock = Clock()

    def wired(rank: Step, pool: Executor | None = None) -> RequestGraph:
        fallback = step("f", "found", "out")
        return graph(slow_find(clock, 1.0), rank, rank=fallback, clock=clock, patient="rank", pool=pool)

    with pytest.raises(DeadlineExceeded, match="rank: the deadline of 50 ms passed before it could start"):
        run_graph(wired(step("rank", "found", "out")), {"request": 0}, Deadline(0.0, 50.0))
    for threads in (None, pool):
        run = run_graph(wired(step("rank", "found", "out", fails), threads), {"request": 0})
        assert run.notes == ("rank: it failed (ValueError); f took its place",)
    own = graph(
        sleeping("rank", "request", "out", 1.0),
        rank=step("f", "request", "out"),
        clock=time.perf_counter,
        patient="rank",
        pool=pool,
        limits={"rank": Limit(deadline_ms=20.0)},
    )
    run = run_graph(own, {"request": 0})
    assert run.notes == ("rank: it was not done in its 20 ms; f took its place",)
    with pytest.raises(GraphError, match=r"'a' is patient and has no fallback; fallbacks are for \[\]"):
        graph(step("a", "request", "out"), patient="a")


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
    run = run_graph(wired, {"request": 0}, Deadline(0.0, 50.0))
    assert run.outputs == {"told": "describe(found)"}
    assert not run.degraded


def test_a_deadline_counts_from_when_the_request_came_not_from_when_it_ran() -> None:
    clock = Clock()
    clock.now = 10.0
    with pytest.raises(DeadlineExceeded, match="a: the deadline"):
        run_graph(graph(step("a", "request", "out"), clock=clock), {"request": 0}, Deadline(9.9, 50.0))


def test_runs_of_one_graph_share_nothing() -> None:
    wired = graph(step("a", "request", "out"))
    assert [run_graph(wired, {"request": n}).outputs["out"] for n in range(3)] == ["a(0)", "a(1)", "a(2)"]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def sleeping(name: str, reads: str, writes: str, seconds: float) -> Step:
    def work(values: Values) -> Values:
        time.sleep(seconds)
        return dict.fromkeys(writes.split(), name)

    return step(name, reads, writes, work)


def test_with_a_pool_what_does_not_wait_overlaps(pool: Executor) -> None:
    wired = graph(
        *(sleeping(f"s{n}", "request", f"v{n}", 0.1) for n in range(4)),
        step("join", "v0 v1 v2 v3", "out"),
        clock=time.perf_counter,
        pool=pool,
    )
    start = time.perf_counter()
    run = run_graph(wired, {"request": 0})
    assert time.perf_counter() - start < 0.25
    assert run.outputs == {"out": "join(s0,s1,s2,s3)"}
    assert {report.name for report in run.reports} == {"s0", "s1", "s2", "s3", "join"}


def test_a_short_path_goes_on_while_the_caller_is_on_a_long_one(pool: Executor) -> None:
    """Whoever ends a stage starts what waited for it: the short path does not wait for the caller's thread."""
    wired = graph(
        sleeping("long", "request", "a", 0.2),
        sleeping("short", "request", "b", 0.05),
        sleeping("then", "b", "c", 0.1),
        step("join", "a c", "out"),
        clock=time.perf_counter,
        pool=pool,
    )
    start = time.perf_counter()
    run_graph(wired, {"request": 0})
    assert time.perf_counter() - start < 0.28


def test_what_is_short_is_done_first_by_the_thread_that_is_there(pool: Executor) -> None:
    did: dict[str, int] = {}

    def noting(name: str, reads: str, writes: str) -> Step:
        def work(values: Values) -> Values:
            did[name] = threading.get_ident()
            time.sleep(0.01)  # long enough for another thread to take what is ready
            return {writes: name}

        return step(name, reads, writes, work)

    wired = graph(
        noting("long", "request", "slow"),
        noting("first", "request", "a"),
        noting("second", "a", "b"),
        step("join", "slow b", "out"),
        clock=time.perf_counter,
        pool=pool,
        short=frozenset({"first", "second"}),
    )
    run_graph(wired, {"request": 0})
    assert list(did) == ["first", "second", "long"]
    assert set(did.values()) == {threading.get_ident()}


def test_what_is_long_is_shared_out_once_nothing_is_short(pool: Executor) -> None:
    wired = graph(
        step("short", "request", "a"),
        *(sleeping(f"s{n}", "request", f"v{n}", 0.1) for n in range(3)),
        step("join", "a v0 v1 v2", "out"),
        clock=time.perf_counter,
        pool=pool,
        short=frozenset({"short"}),
    )
    start = time.perf_counter()
    run_graph(wired, {"request": 0})
    assert time.perf_counter() - start < 0.2


def test_a_stage_that_is_not_done_in_time_is_left_and_its_fallback_answers(pool: Executor) -> None:
    wired = graph(
        sleeping("rank", "request", "out", 0.5),
        rank=step("f", "request", "out"),
        clock=time.perf_counter,
        pool=pool,
    )
    start = time.perf_counter()
    run = run_graph(wired, {"request": "r"}, Deadline(start, 50.0))
    assert time.perf_counter() - start < 0.2
    assert run.outputs == {"out": "f(r)"}
    assert run.notes == ("rank: the deadline of 50 ms passed before it was done; f took its place",)
    assert [report.name for report in run.reports] == ["f"]


def test_a_fallback_has_time_of_its_own_before_the_deadline(pool: Executor) -> None:
    def ask(deadline_ms: float) -> tuple[float, tuple[str, ...]]:
        late = sleeping("rank", "request", "out", 0.5)
        fallback = step("f", "request", "out")
        wired = graph(late, clock=time.perf_counter, pool=pool, rank=fallback, spare_ms=40)
        start = time.perf_counter()
        run = run_graph(wired, {"request": 0}, Deadline(start, deadline_ms))
        return 1000 * (time.perf_counter() - start), run.notes

    took_ms, notes = ask(150)
    assert took_ms < 150
    assert notes == ("rank: it was not done 15 ms before the deadline of 150 ms; f took its place",)
    took_ms, notes = ask(450)
    assert 400 < took_ms < 450
    assert notes == ("rank: it was not done 40 ms before the deadline of 450 ms; f took its place",)


def test_a_stage_has_a_deadline_of_its_own(pool: Executor) -> None:
    slow = sleeping("find", "request", "found", 0.5)
    limits = {"find": Limit(deadline_ms=40.0)}
    wired = graph(
        slow,
        step("rank", "found", "out"),
        find=step("f", "request", "found"),
        clock=time.perf_counter,
        pool=pool,
        limits=limits,
    )
    run = run_graph(wired, {"request": "r"})
    assert run.outputs == {"out": "rank(f(r))"}
    assert run.notes == ("find: it was not done in its 40 ms; f took its place",)
    required = graph(slow, step("rank", "found", "out"), clock=time.perf_counter, pool=pool, limits=limits)
    with pytest.raises(DeadlineExceeded, match="find: it was not done in its 40 ms; allow more"):
        run_graph(required, {"request": "r"})


def test_a_required_stage_that_others_run_is_waited_for_no_longer_than_the_deadline(pool: Executor) -> None:
    wired = graph(
        sleeping("one", "request", "a", 0.01),
        sleeping("two", "request", "b", 0.6),
        step("join", "a b", "out"),
        clock=time.perf_counter,
        pool=pool,
        limits={"two": Limit(deadline_ms=10_000.0)},
    )
    start = time.perf_counter()
    with pytest.raises(DeadlineExceeded, match="two: the deadline of 50 ms passed before it was done"):
        run_graph(wired, {"request": 0}, Deadline(start, 50.0))
    assert time.perf_counter() - start < 0.3


def test_once_an_answer_exists_the_requests_deadline_ends_no_stage_with_a_longer_one_of_its_own(pool: Executor) -> None:
    wired = RequestGraph(
        [sleeping("rank", "request", "won", 0.06), sleeping("tell", "won", "out", 0.02)],
        inputs=frozenset({"request"}),
        outputs=frozenset({"out"}),
        answer="won",
        fallbacks={},
        limits={"tell": Limit(deadline_ms=5_000.0, at_once=1)},
        pool=pool,
        clock=time.perf_counter,
    )
    deadline = Deadline(time.perf_counter(), 50.0)
    assert run_graph(wired, {"request": "r"}, deadline).outputs == {"out": "tell"}


def test_who_has_no_turn_in_the_stages_own_time_is_left_and_never_begins() -> None:
    begun: list[object] = []

    def begin(values: Values) -> Values:
        begun.append(values["request"])
        return {"found": 1}

    with ThreadPoolExecutor(1) as pool:
        wired = graph(
            step("find", "request", "found", begin),
            step("rank", "found", "out"),
            find=step("f", "", "found"),
            clock=time.perf_counter,
            pool=pool,
            limits={"find": Limit(deadline_ms=60.0, at_once=1)},
        )
        with wired.turns["find"]:
            run = run_graph(wired, {"request": "r"})
            reason = run.notes[0].partition(";")[0]
            assert reason in ("find: it was not done in its 60 ms", "find: it had no turn in time")
            assert run.outputs == {"out": "rank(f())"}
            assert [report.name for report in run.reports] == ["f", "rank"]
            assert not begun
            pool.submit(int).result(5)  # the thread waits for no turn any more
    assert not begun, "nor when there is a turn again"


@pytest.mark.parametrize("is_watched", [False, True])
def test_an_error_on_any_thread_is_the_requests(pool: Executor, is_watched: bool) -> None:
    limits = {name: Limit(deadline_ms=5_000.0) for name in ("left", "right") if is_watched}
    for broken in ("left", "right"):
        wired = graph(
            *(step(name, "request", name[0], fails if name == broken else None) for name in ("left", "right")),
            step("join", "l r", "out"),
            clock=time.perf_counter,
            pool=pool,
            limits=limits,
        )
        with pytest.raises(ValueError, match="a stage broke"):
            run_graph(wired, {"request": 0})


def test_only_so_many_of_a_stage_run_at_once(pool: Executor) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def work(_: Values) -> Values:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return {"out": 1}

    wired = graph(step("a", "request", "out", work), clock=time.perf_counter, limits={"a": Limit(at_once=2)})
    threads = [threading.Thread(target=run_graph, args=(wired, {"request": 0})) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 2


def test_who_has_no_turn_in_time_is_replaced_or_refused() -> None:
    limits = {"a": Limit(at_once=1)}
    wired = graph(step("a", "request", "out"), a=step("f", "request", "out"), clock=time.perf_counter, limits=limits)
    required = graph(step("a", "request", "out"), clock=time.perf_counter, limits=limits)
    for one in (wired, required):
        assert one.turns["a"].acquire()
    run = run_graph(wired, {"request": "r"}, Deadline(time.perf_counter(), 30.0))
    assert run.notes == ("a: it had no turn in time; f took its place",)
    with pytest.raises(DeadlineExceeded, match="a: it had no turn in time; allow more"):
        run_graph(required, {"request": "r"}, Deadline(time.perf_counter(), 30.0))


def test_a_request_that_is_given_up_starts_nothing_more(pool: Executor) -> None:
    cancelled, later = Stop(), []
    wired = graph(
        step("a", "request", "x", lambda _: cancelled.set() or {"x": 1}),
        step("b", "x", "out", lambda _: later.append(1) or {"out": 1}),
        clock=time.perf_counter,
        pool=pool,
    )
    with pytest.raises(Cancelled, match="given up"):
        run_graph(wired, {"request": 0}, cancelled=cancelled)
    assert not later


def test_a_request_that_is_given_up_is_not_waited_for(pool: Executor) -> None:
    cancelled = Stop()
    wired = graph(
        sleeping("a", "request", "out", 1.0), a=step("f", "request", "out"), clock=time.perf_counter, pool=pool
    )
    threading.Timer(0.05, cancelled.set).start()
    start = time.perf_counter()
    with pytest.raises(Cancelled):
        run_graph(wired, {"request": 0}, cancelled=cancelled)
    assert time.perf_counter() - start < 0.5


def heeds(stage: str, limit_s: float = 5.0) -> Stage:
    """One that works until nobody waits any more, or `limit_s`, and says on which thread."""

    def works(_: Values) -> Values:
        start, stop = time.perf_counter(), current()
        while not stop.is_left() and time.perf_counter() - start < limit_s:
            time.sleep(0.001)
        stop.check()
        return {"out": threading.get_ident()}

    return step(stage, "request", "out", works)


def heeding_graph(pool: Executor, *beside: Stage, limit_s: float = 5.0, **more: object) -> RequestGraph:
    fallback = step("f", "request", "out")
    return graph(
        heeds("a", limit_s), *beside, a=fallback, clock=time.perf_counter, pool=pool, heeding=frozenset({"a"}), **more
    )


def test_a_stage_that_heeds_runs_where_it_is_and_is_left_at_its_time(pool: Executor) -> None:
    wired = heeding_graph(pool, limit_s=0.01)
    assert run_graph(wired, {"request": "r"}).outputs["out"] == threading.get_ident()
    start = time.perf_counter()
    late = run_graph(heeding_graph(pool), {"request": "r"}, Deadline(start, 100.0))
    assert late.outputs["out"] == "f(r)"
    assert late.notes == ("a: the deadline of 100 ms passed before it was done; f took its place",)
    own = heeding_graph(pool, limits={"a": Limit(deadline_ms=50.0)})
    assert run_graph(own, {"request": "r"}).notes == ("a: it was not done in its 50 ms; f took its place",)
    assert time.perf_counter() - start < 2
    assert not current().is_left(), "what runs here next may take its time"


def test_a_stage_that_heeds_and_has_no_fallback_is_a_deadline_exceeded(pool: Executor) -> None:
    limits = {"a": Limit(deadline_ms=50.0)}
    wired = graph(heeds("a"), clock=time.perf_counter, pool=pool, heeding=frozenset({"a"}), limits=limits)
    with pytest.raises(DeadlineExceeded, match="a: it was not done in its 50 ms; allow more with deadline_ms"):
        run_graph(wired, {"request": "r"})


def test_a_stage_that_heeds_ends_when_its_client_leaves(pool: Executor) -> None:
    gone, start = Stop(), time.perf_counter()
    threading.Timer(0.05, gone.set).start()
    with pytest.raises(Cancelled, match="given up"):
        run_graph(heeding_graph(pool), {"request": "r"}, None, gone)
    assert time.perf_counter() - start < 2


def test_what_ends_by_something_else_is_no_lateness(pool: Executor) -> None:
    def ends(_: Values) -> Values:
        raise Cancelled("somebody else's")

    wired = graph(
        step("a", "request", "out", ends), a=step("f", "request", "out"), clock=time.perf_counter, pool=pool,
        heeding=frozenset({"a"}),
    )  # fmt: skip
    with pytest.raises(Cancelled, match="somebody else's"):
        run_graph(wired, {"request": "r"}, Deadline(time.perf_counter(), 5000.0))


def test_beside_others_a_stage_that_heeds_is_watched_as_any(pool: Executor) -> None:
    """For whoever runs it could leave nobody else in time."""
    beside = sleeping("b", "request", "other", 0.5)
    wired = heeding_graph(pool, beside, b=step("g", "request", "other"), outputs=frozenset({"out", "other"}))
    start = time.perf_counter()
    run = run_graph(wired, {"request": "r"}, Deadline(start, 100.0))
    assert run.outputs == {"out": "f(r)", "other": "g(r)"}
    assert time.perf_counter() - start < 0.4


def test_a_heeding_stage_that_is_none_is_refused(pool: Executor) -> None:
    with pytest.raises(GraphError, match="'c' is said to be heeding, and is no stage"):
        graph(heeds("a"), heeding=frozenset({"c"}))


def test_what_is_left_behind_is_told_so(pool: Executor) -> None:
    """By its own deadline, by the request's, by a client who leaves, and by an error elsewhere."""
    ended: list[float] = []
    begun = threading.Event()

    def works(_: Values) -> Values:
        start, stop = time.perf_counter(), current()
        begun.set()
        while not stop.is_set() and time.perf_counter() - start < 5:
            time.sleep(0.001)
        ended.append(time.perf_counter() - start)
        stop.check()
        return {"out": "too late"}

    def fails_after(values: Values) -> Values:
        assert begun.wait(5)
        return fails(values)

    def ask(deadline_ms: float | None, limit_ms: float | None, beside: Stage | None = None) -> object:
        cancelled = Stop()
        if deadline_ms is None and limit_ms is None:
            threading.Timer(0.25, cancelled.set).start()
        stages = [step("a", "request", "out", works), *([beside] if beside else [])]
        limits = {} if limit_ms is None else {"a": Limit(deadline_ms=limit_ms)}
        fallback = step("f", "request", "out")
        made = graph(*stages, a=fallback, clock=time.perf_counter, pool=pool, limits=limits)
        deadline = None if deadline_ms is None else Deadline(time.perf_counter(), deadline_ms)
        return run_graph(made, {"request": "r"}, deadline, cancelled).outputs["out"]

    assert ask(None, 250) == "f(r)"
    assert ask(250, None) == "f(r)"
    with pytest.raises(Cancelled):
        ask(None, None)
    begun.clear()  # one that has not begun when another fails never does
    with pytest.raises(ValueError, match="a stage broke"):
        ask(None, 60_000, step("b", "request", "b", fails_after))
    until = time.perf_counter() + 2
    while len(ended) < 4 and time.perf_counter() < until:
        time.sleep(0.005)
    assert len(ended) == 4
    assert max(ended) < 2


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"b": Limit()}, r"a limit is for 'b', which is no stage; stages: \['a'\]"),
        ({"a": Limit(at_once=0)}, "stage 'a': expected at_once of 1 or more, got 0"),
    ],
)
def test_a_limit_that_cannot_work_is_refused_by_name(limits: Mapping[str, Limit], says: str) -> None:
    with pytest.raises(GraphError, match=says):
        graph(step("a", "request", "out"), limits=limits)


def test_many_requests_at_once_each_get_their_own_answer(pool: Executor) -> None:
    """A pool smaller than what all requests want at once only makes them wait."""
    wired = graph(
        step("l", "request", "a"),
        step("r", "request", "b"),
        sleeping("m", "request", "c", 0.001),
        step("join", "a b c", "d"),
        step("last", "d", "out"),
        join=step("f", "a b c", "d"),
        clock=time.perf_counter,
        pool=pool,
    )
    wrong: list[object] = []

    def ask(user: int) -> None:
        for turn in range(100):
            number = 1000 * user + turn
            out = run_graph(wired, {"request": number}).outputs["out"]
            if out != f"last(join(l({number}),r({number}),m))":
                wrong.append(out)

    threads = [threading.Thread(target=ask, args=(user,)) for user in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_short_stage_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(GraphError, match=r"'b' is said to be short, and is no stage; stages: \['a'\]"):
        graph(step("a", "request", "out"), short=frozenset({"b"}))
