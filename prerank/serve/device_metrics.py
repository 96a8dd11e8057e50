"""What device engines count, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prerank.serve.device_engines import Engine

_COUNTS = {
    "requests": ("requests", "Requests that a device answered."),
    "batches": ("batches", "Batches that they were answered in."),
    "candidates": ("candidates", "Candidates of these requests."),
    "padding": ("padding", "Candidates that were computed beside them, for a batch has one of a few shapes."),
    "cut": ("cut_requests", "Requests of more candidates than the largest shape, judged in pieces."),
    "refused": ("refused", "Requests that were refused as they came, for they would have been late."),
    "fallbacks": ("fallbacks", "Requests that were answered without the device, for it failed."),
    "eager": ("eager_launches", "Shapes, or pieces, that torch computed for want of a captured graph."),
    "restarts": ("restarts", "How often the device was lost, and begun again."),
}
_GRAPHS = {"eager_captures": "capture", "eager_replays": "replay"}
_BYTES = {"graph_bytes": "graphs", "table_bytes": "tables", "buffer_bytes": "buffers"}


class DeviceMetrics(Collector):
    """Of an engine, by the name of its device."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        found = self._engine.snapshots()
        for field, (name, about) in _COUNTS.items():
            counts = CounterMetricFamily(f"prerank_device_{name}", about, labels=["device"])
            for device, one in found.items():
                counts.add_metric([device], getattr(one, field))
            yield counts
        about = "Shapes whose graph could not be captured, or not be replayed; torch computes them since."
        graphs = CounterMetricFamily("prerank_device_graph_failures", about, labels=["device", "at"])
        waiting = GaugeMetricFamily("prerank_device_waiting", "Requests that wait for a device.", labels=["device"])
        about = "Memory of a device: held by captured graphs, by weights and tables, and by what is copied through."
        held = GaugeMetricFamily("prerank_device_bytes", about, labels=["device", "of"])
        for device, one in found.items():
            waiting.add_metric([device], one.waiting)
            for field, at in _GRAPHS.items():
                graphs.add_metric([device, at], getattr(one, field))
            for field, of in _BYTES.items():
                held.add_metric([device, of], getattr(one, field))
        yield from (graphs, waiting, held)
