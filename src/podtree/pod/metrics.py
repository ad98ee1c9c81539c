"""What a supervisor counts, and how Prometheus reads it (exposition format 0.0.4, by prometheus_client)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from podtree.errors import Conflict, PodtreeError
from podtree.kernel import procfs

BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # of the histograms' buckets


class Times(msgspec.Struct):
    """A histogram. `buckets`: how many were at most each of BOUNDS_S, one above the other, then all."""

    buckets: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.total_s += seconds
        for index, bound in enumerate((*BOUNDS_S, float("inf"))):
            self.buckets[index] += seconds <= bound


class Tally(msgspec.Struct):
    """Since the supervisor began."""

    begun: float = msgspec.field(default_factory=time.time)
    checkpoints: int = 0
    failed: int = 0
    bytes_written: int = 0
    last_durable: float = 0.0  # CLOCK_REALTIME, seconds
    pause: Times = msgspec.field(default_factory=Times)
    lag: Times = msgspec.field(default_factory=Times)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Scope of one attempt at a checkpoint. A pod that is in other hands is no failure."""
        try:
            yield
        except Conflict:
            raise
        except BaseException:
            self.failed += 1
            raise

    def durable(self, summary: dict[str, Any]) -> None:
        self.checkpoints += 1
        self.bytes_written += summary["bytes_written"]
        self.last_durable = time.time()
        self.pause.add(summary["pause_ms"] / 1e3)
        self.lag.add(summary["lag_ms"] / 1e3)


def of_process(pid: int) -> dict[str, int]:
    """Resident memory in bytes, and open descriptors."""
    status = procfs.status(pid)
    return {"rss": int(status.get("VmRSS", "0 kB").split()[0]) << 10, "fds": len(os.listdir(f"/proc/{pid}/fd"))}


def exposition(pods: Iterable[dict[str, Any]], pool: dict[str, int]) -> bytes:
    """The text for a scraper. `pods`: what supervisors reply to "metrics"; `pool`: sizes in bytes, by name."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Collector(list(pods), pool))
    return generate_latest(registry)


class _Collector:
    """prometheus_client's protocol: one family of metrics after the other."""

    def __init__(self, pods: list[dict[str, Any]], pool: dict[str, int]) -> None:
        self._pods = pods
        self._pool = pool

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        space = GaugeMetricFamily("podtree_pool_bytes", "Room of the pool.", labels=["what"])
        for name, value in self._pool.items():
            space.add_metric([name], value)
        yield space
        tallies = [(self._labels(pod), msgspec.convert(pod["tally"], Tally), pod) for pod in self._pods]
        labels = ["pod", "id"]
        for name, text, field in (
            ("checkpoints", "Checkpoints that became durable.", "checkpoints"),
            ("checkpoints_failed", "Attempts that failed or were refused.", "failed"),
            ("written_bytes", "Memory written by checkpoints.", "bytes_written"),
        ):
            counter = CounterMetricFamily(f"podtree_{name}", text, labels=labels)
            for values, tally, _pod in tallies:
                counter.add_metric(values, getattr(tally, field), created=tally.begun)
            yield counter
        for name, text, field in (
            ("pause_seconds", "For how long checkpoints stopped the pod.", "pause"),
            ("lag_seconds", "From when the pod went on until the checkpoint was durable.", "lag"),
        ):
            histogram = HistogramMetricFamily(f"podtree_{name}", text, labels=labels)
            for values, tally, _pod in tallies:
                times: Times = getattr(tally, field)
                bounds = [*(f"{bound:g}" for bound in BOUNDS_S), "+Inf"]
                histogram.add_metric(values, list(zip(bounds, times.buckets, strict=True)), times.total_s)
            yield histogram
        for name, text, key in (
            ("last_durable_timestamp_seconds", "When a checkpoint was last durable; 0: never.", "last"),
            ("recorder_interval_seconds", "The recorder's interval; 0: none.", "interval"),
            ("supervisor_resident_bytes", "Memory of the supervisor.", "rss"),
            ("supervisor_descriptors", "Open descriptors of the supervisor.", "fds"),
            ("processes", "Processes of the pod.", "processes"),
        ):
            gauge = GaugeMetricFamily(f"podtree_{name}", text, labels=labels)
            for values, tally, pod in tallies:
                gauge.add_metric(values, tally.last_durable if key == "last" else pod[key])
            yield gauge

    @staticmethod
    def _labels(pod: dict[str, Any]) -> list[str]:
        return [str(pod["pod"]), str(pod["id"])]


def gather(calls: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """What each of them gives; a pod that has just ended, or whose supervisor doesn't answer, is left out."""
    for call in calls:
        with contextlib.suppress(PodtreeError, OSError):
            yield call()
