"""What Prometheus reads at `/metrics` (https://prometheus.io/docs/practices/naming)."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SCORES = tuple(step / 20 for step in range(1, 21))
BATCHES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The metrics of one server.

    Attributes:
        latency: seconds from a request's headers to its answer, of requests to `/v1/predict`.
        stages: seconds of an image in each stage: decode, queue, network, finish.
        queue: the number of images that are accepted and not yet answered.
        batches: the number of images in each batch.
        verdicts: images by model and verdict: good, defect, none.
        scores: the scores of images with a verdict, by model.
        refused: requests or images without a verdict, by reason.
        loads: attempts to load a model, by model and result: ok, refused.
    """

    def __init__(self) -> None:
        """Make metrics of their own: a process may have several servers."""
        self.registry = registry = CollectorRegistry()
        self.latency = Histogram(
            "flawmask_request_seconds", "From a request to its answer", buckets=SECONDS, registry=registry
        )
        self.stages = Histogram(
            "flawmask_stage_seconds", "An image in each stage", ["stage"], buckets=SECONDS, registry=registry
        )
        self.queue = Gauge("flawmask_queue_images", "Images accepted and not yet answered", registry=registry)
        self.batches = Histogram("flawmask_batch_images", "Images in a batch", buckets=BATCHES, registry=registry)
        self.verdicts = Counter(
            "flawmask_verdicts", "Images by verdict: good, defect, none", ["model", "verdict"], registry=registry
        )
        self.scores = Histogram(
            "flawmask_score", "Scores of images with a verdict", ["model"], buckets=SCORES, registry=registry
        )
        self.refused = Counter(
            "flawmask_refused", "Requests or images without a verdict, by reason", ["reason"], registry=registry
        )
        self.loads = Counter(
            "flawmask_model_loads", "Attempts to load a model: ok, refused", ["model", "result"], registry=registry
        )

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)
