"""What Prometheus reads of the service, beside what vLLM says of its engine. Both stand at `/metrics`."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["Metrics"]

_SECONDS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)


class Metrics:
    """The service's figures.

    Args:
        registry: where they stand; the process's own when left out.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.queued = Gauge("poet_jobs_queued", "Jobs that wait.", registry=registry)
        self.running = Gauge("poet_jobs_running", "Jobs that are being carried out.", registry=registry)
        self.ended = Counter("poet_jobs_ended", "Jobs that ended.", ["status"], registry=registry)
        self.ids = Counter("poet_ids_written", "Output ids written.", registry=registry)
        self.first_frame = Histogram(
            "poet_time_to_first_frame_seconds",
            "From a job's acceptance until the ids of its first picture are written.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.clip = Histogram(
            "poet_clip_seconds", "From a job's beginning until its clip is kept.", buckets=_SECONDS, registry=registry
        )
        self.errors = Counter(
            "poet_errors", "Requests and jobs that failed, by their code.", ["code"], registry=registry
        )
        self.requests = Counter("poet_requests", "Requests answered, by status.", ["status"], registry=registry)
