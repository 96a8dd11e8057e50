"""What the workers' parts of a version on a device share."""

from __future__ import annotations

from dataclasses import dataclass

from prerank.serve.device_buckets import Buckets
from prerank.serve.device_counts import Counts
from prerank.serve.device_streams import Device, Stream
from prerank.serve.device_times import Times
from prerank.serve.device_updates import Updates


@dataclass(frozen=True, slots=True)
class Ground:
    """What of a version is there once: tables with their `updates`, which shapes there are, how long each takes.

    What comes to the `device` comes through the stream `loading`.
    """

    device: Device
    loading: Stream
    updates: Updates
    buckets: Buckets
    times: Times
    counts: Counts
