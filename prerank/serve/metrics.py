"""What a server counts and times, in Prometheus' form. One registry an app, so two apps in one process do not mix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from prerank.serve.answer import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = tuple(n * 10.0**e for e in (-4, -3, -2, -1, 0) for n in (1.0, 2.0, 5.0))


class ServeMetrics:
    """The counters of one app."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._version = Gauge("prerank_version", "1 for the version that serves.", ["version"], registry=self._registry)
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
        self._in_flight = Gauge(
            "prerank_requests_in_flight", "Recommend requests waiting or running.", registry=self._registry
        )

    def serves(self, version: str) -> None:
        """Note the version that serves."""
        self._version.labels(version).set(1)

    def answered(self, answer: Answer) -> None:
        """Note an answer's stages."""
        for stage in answer.stages:
            self._stages.labels(stage.name).observe(stage.ms / 1000.0)
            self._came_in.labels(stage.name).inc(stage.num_in)
            self._came_out.labels(stage.name).inc(stage.num_out)
        if answer.degraded:
            self._degraded.inc()

    def failed(self, kind: str) -> None:
        """Note an error answer of this type."""
        self._errors.labels(kind).inc()

    def took(self, status: int, seconds: float) -> None:
        """Note a recommend request's whole time, whatever came of it."""
        self._requests.labels(str(status)).observe(seconds)

    def in_flight(self, num_requests: int) -> None:
        """Note how many recommend requests are here now."""
        self._in_flight.set(num_requests)

    def text(self) -> bytes:
        """Everything, as a scraper reads it."""
        return generate_latest(self._registry)
