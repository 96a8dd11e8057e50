"""What a server counts and times, in Prometheus' form. One registry an app, so two apps in one process do not mix."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prerank.serve.answer import Answer
from prerank.serve.changes import Changed
from prerank.serve.device_engines import Engine
from prerank.serve.device_metrics import DeviceMetrics
from prerank.serve.hosts import IndexHosts
from prerank.serve.live_version import LiveVersion
from prerank.serve.record import Recorded
from prerank.serve.request_log import RequestLog
from prerank.serve.seen import Spans
from prerank.stores.events import LiveEvent

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = tuple(n * 10.0**e for e in (-4, -3, -2, -1, 0) for n in (1.0, 2.0, 5.0))


class _Serving(Collector):
    """What serves when somebody scrapes, and counts that are kept where they are counted."""

    def __init__(self, live: LiveVersion) -> None:
        self._live = live

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        loads = self._live.loads
        switched = CounterMetricFamily(
            "prerank_version_loads",
            "Versions that went live while this process served, by whether they serve or served, or could not.",
            labels=["outcome"],
        )
        switched.add_metric(["switched"], loads.switched)
        switched.add_metric(["failed"], loads.failed)
        yield switched
        yield GaugeMetricFamily(
            "prerank_version_load_seconds", "Of the last version that was switched to, until it served.", loads.last_s
        )
        about = "Versions that were left and are in memory still, for requests that use them have not ended."
        yield GaugeMetricFamily("prerank_versions_kept", about, loads.kept)
        if self._live.error is not None:
            return
        with self._live.taken() as funnel:
            yield _one("prerank_version", "1 for the version that serves.", "version", funnel.version)
            about = "1 for what ranks: a device, the instructions of the native kernels, or torch where there are none."
            yield _one("prerank_ranks_by", about, "level", funnel.ranks_by)
            free = "Rows of slack that items which come may take."
            yield GaugeMetricFamily("prerank_items_free_rows", free, funnel.free_rows)
            evicted = CounterMetricFamily(
                "prerank_tail_evictions", "Fetched items that left memory again, by why.", labels=["why"]
            )
            for why, number in funnel.tail_evictions.items():
                evicted.add_metric([why], number)
            yield evicted
            family = CounterMetricFamily(
                "prerank_tail_candidates",
                "Candidates that are not resident, by what came of them; from 0 again with another version.",
                labels=["outcome"],
            )
            for outcome, number in funnel.tail_counts.items():
                family.add_metric([outcome], number)
        yield family


class _Hosts(Collector):
    """The index hosts, as they count themselves."""

    def __init__(self, hosts: IndexHosts) -> None:
        self._hosts = hosts

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        asked = CounterMetricFamily(
            "prerank_index_shards", "What came of asking a shard's hosts.", labels=["shard", "outcome"]
        )
        for (number, outcome), times in self._hosts.counts().items():
            asked.add_metric([str(number), outcome], times)
        yield asked
        holds = GaugeMetricFamily("prerank_index_host_version", "1 for what a host holds.", labels=["host", "version"])
        for name, versions in self._hosts.holdings().items():
            for version in versions:
                holds.add_metric([name, version], 1)
        yield holds
        missing = set(self._hosts.missing())
        about = "1 for a shard of which a host answers and holds a version, 0 for one that is missing."
        answers = GaugeMetricFamily("prerank_index_shard_up", about, labels=["shard"])
        for number in range(len(self._hosts.shards)):
            answers.add_metric([str(number)], number not in missing)
        yield answers
        towers = GaugeMetricFamily("prerank_user_tower", "1 for a user tower that is loaded.", labels=["version"])
        for version in self._hosts.towers.loaded:
            towers.add_metric([version], 1)
        yield towers
        about = "Candidates of index hosts that the serving version does not have."
        yield CounterMetricFamily("prerank_index_unknown_items", about, self._hosts.num_dropped)
        about = "Requests whose shards were asked in several versions, each by a user vector of its own."
        yield CounterMetricFamily("prerank_index_several_versions", about, self._hosts.num_of_several)


class _Sent(Collector):
    """What came of spans, counted by who sends them."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        about = "Spans by outcome: sent, failed (the collector did not take them), dropped (too many waited)."
        family = CounterMetricFamily("prerank_spans", about, labels=["outcome"])
        for outcome, number in self._spans.counts().items():
            family.add_metric([outcome], number)
        yield family


class _Logging(Collector):
    """What becomes of the requests that are logged."""

    def __init__(self, log: RequestLog) -> None:
        self._log = log

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        family = CounterMetricFamily(
            "prerank_logged_requests",
            "Requests of the share that is logged: written to a file, dropped for want of room to wait, or failed.",
            labels=["outcome"],
        )
        for outcome, number in self._log.counts().items():
            family.add_metric([outcome], number)
        yield family
        yield GaugeMetricFamily(
            "prerank_logged_requests_waiting", "Requests that wait to be logged.", self._log.num_waiting
        )


def _one(name: str, about: str, label: str, value: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, about, labels=[label])
    family.add_metric([value], 1)
    return family


class ServeMetrics:
    """The counters of one app."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._changed = Counter("prerank_items_changed", "Changes of items accepted.", registry=self._registry)
        self._unknown_changed = Counter(
            "prerank_items_unknown", "Changes accepted of items the version lacks.", registry=self._registry
        )
        self._requests = Histogram(
            "prerank_request_seconds",
            "Time from a recommend request's arrival to its answer, waiting for a worker included.",
            ["status"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._stages = Histogram(
            "prerank_stage_seconds", "Time in one stage.", ["stage"], buckets=_SECONDS, registry=self._registry
        )
        self._came_in = Counter(
            "prerank_stage_in", "Things that went into a stage.", ["stage"], registry=self._registry
        )
        self._came_out = Counter(
            "prerank_stage_out", "Things that came out of a stage.", ["stage"], registry=self._registry
        )
        self._errors = Counter("prerank_errors", "Answers that are errors, by type.", ["type"], registry=self._registry)
        self._degraded = Counter("prerank_degraded", "Answers with a stage replaced.", registry=self._registry)
        self._refused = Counter(
            "prerank_refused",
            "Calls turned away before any work, by why: queue_full, deadline (it would pass first) or draining.",
            ["why"],
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "prerank_requests_in_flight", "Recommend requests waiting or running.", registry=self._registry
        )

        self._calls = Histogram(
            "prerank_events_seconds",
            "Time from the arrival of a call with events to its answer, the disk's included.",
            ["status"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._calls_in_flight = Gauge(
            "prerank_events_in_flight", "Calls with events waiting or running.", registry=self._registry
        )
        self._events = Counter("prerank_events", "Events accepted, by name.", ["event"], registry=self._registry)
        self._uncounted = Counter(
            "prerank_events_uncounted",
            "Events accepted and not counted a second time: repeated, or already in the log.",
            ["why"],
            registry=self._registry,
        )
        self._unknown_items = Counter(
            "prerank_events_unknown_items", "Events accepted of items the version lacks.", registry=self._registry
        )

    def changed(self, changed: Changed) -> None:
        """Note the changes of one call."""
        self._changed.inc(changed.accepted)
        self._unknown_changed.inc(changed.unknown_items)

    def serves(self, live: LiveVersion) -> None:
        """Say of `live`, whenever somebody scrapes, which version serves, and what it counts itself."""
        self._registry.register(_Serving(live))

    def asks(self, hosts: IndexHosts) -> None:
        """Say of `hosts`, whenever somebody scrapes, what they hold and what came of asking them."""
        self._registry.register(_Hosts(hosts))

    def ranks_on(self, engine: Engine) -> None:
        """Say of `engine`, whenever somebody scrapes, what it counts itself."""
        self._registry.register(DeviceMetrics(engine))

    def sends(self, spans: Spans) -> None:
        """Say, whenever somebody scrapes, what came of `spans`."""
        self._registry.register(_Sent(spans))

    def logs(self, log: RequestLog) -> None:
        """Say of `log`, whenever somebody scrapes, what it counts itself."""
        self._registry.register(_Logging(log))

    def answered(self, answer: Answer) -> None:
        """Note an answer's stages."""
        for stage in answer.stages:
            self._stages.labels(stage.name).observe(stage.ms / 1000.0)
            self._came_in.labels(stage.name).inc(stage.num_in)
            self._came_out.labels(stage.name).inc(stage.num_out)
        if answer.degraded:
            self._degraded.inc()

    def recorded(self, events: Sequence[LiveEvent], recorded: Recorded) -> None:
        """Note the events of one call."""
        for name, number in Counts(one.event for one in events).items():
            self._events.labels(name).inc(number)
        self._uncounted.labels("repeated").inc(recorded.repeated)
        self._uncounted.labels("already_logged").inc(recorded.already_logged)
        self._unknown_items.inc(recorded.unknown_items)

    def failed(self, kind: str) -> None:
        """Note an error answer of this type."""
        self._errors.labels(kind).inc()

    def refused(self, why: str) -> None:
        """Note a call that was turned away before any work."""
        self._refused.labels(why).inc()

    def took(self, path: str, status: int, seconds: float) -> None:
        """Note the whole time of a call to one of the endpoints that work, whatever came of it."""
        times = {"/v1/recommend": self._requests, "/v1/events": self._calls}.get(path)
        if times is not None:
            times.labels(str(status)).observe(seconds)

    def in_flight(self, num_requests: int) -> None:
        """Note how many recommend requests are here now."""
        self._in_flight.set(num_requests)

    def events_in_flight(self, num_calls: int) -> None:
        """Note how many calls with events are here now."""
        self._calls_in_flight.set(num_calls)

    def text(self) -> bytes:
        """Everything, as a scraper reads it."""
        return generate_latest(self._registry)
