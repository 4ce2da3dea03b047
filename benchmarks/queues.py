"""Simulates the queues of docs/scale.md: how long an archive takes if machines differ, die, and share one bucket.

    python benchmarks/queues.py

Workers predict parts of an archive. They get them in three ways: each worker has one shard of its own; a scheduler
gives out eight times as many shards as there are workers; or one queue gives out single parts, as Ray does. A worker
that dies loses the part that it is at, and comes back after a while. Only speeds and deaths are random, and their seed
is fixed. The throughput of a worker comes from docs/benchmarks.md and docs/benchmarks-gpu.md; no machine was used.
"""

import heapq
from collections import deque
from dataclasses import dataclass

import numpy as np
import tyro
from measuring import table


@dataclass(frozen=True, kw_only=True)
class Config:
    """The archive and the machines."""

    images: int = 100_000_000
    """Images in the archive."""
    rows_per_part: int = 10_000
    """Images in a part."""
    workers: int = 64
    """Workers: GPUs, or machines without one."""
    rate: float = 65.6
    """Images per second of a worker of medium speed."""
    spread: float = 0.15
    """How much workers differ: the standard deviation of the logarithm of their speed."""
    hours_between_deaths: float = 24.0
    """The mean time after which a worker dies, as preemptible machines do."""
    minutes_until_back: float = 10.0
    """The time until a worker is back."""
    bucket_rate: float = 20_000.0
    """Images per second that the bucket serves at most, to all workers together."""
    seed: int = 0
    """The seed of speeds and deaths."""


@dataclass(frozen=True)
class Simulated:
    """The result of one way to give out parts.

    Attributes:
        hours: until the last part is written.
        used: the share of the workers' time, until then, in which they predict something that is kept.
        repeated: the number of images that are predicted twice.
        deaths: how often a worker died.
    """

    hours: float
    used: float
    repeated: float
    deaths: int


def simulate(config: Config, tasks: int, *, is_pinned: bool) -> Simulated:
    """Simulate the parts as so many tasks. A pinned task belongs to one worker; others wait in a queue."""
    draw = np.random.default_rng(config.seed)
    parts = -(-config.images // config.rows_per_part)
    rates = config.rate * np.exp(draw.normal(0, config.spread, config.workers))
    rates *= min(1.0, config.bucket_rate / rates.sum())
    mean = 3600 * config.hours_between_deaths
    dies_at = draw.exponential(mean, config.workers)
    sizes = [parts // tasks + (number < parts % tasks) for number in range(tasks)]
    queue = deque(sizes[config.workers :] if is_pinned else sizes)
    left = sizes[: config.workers] if is_pinned else [0] * config.workers  # parts of each worker's task
    events = [(0.0, worker) for worker in range(config.workers)]
    end = kept = repeated = 0.0
    deaths = 0
    while events:
        now, worker = heapq.heappop(events)
        if not left[worker]:
            if not queue:
                continue
            left[worker] = queue.popleft()
        takes = config.rows_per_part / rates[worker]
        if now + takes <= dies_at[worker]:
            left[worker] -= 1
            kept += takes
            end = max(end, now + takes)
            heapq.heappush(events, (now + takes, worker))
            continue
        repeated += max(0.0, dies_at[worker] - now) * rates[worker]
        deaths += 1
        back = dies_at[worker] + 60 * config.minutes_until_back
        dies_at[worker] = back + draw.exponential(mean)
        if not is_pinned:  # another worker goes on with it
            queue.appendleft(left[worker])
            left[worker] = 0
        heapq.heappush(events, (back, worker))
    return Simulated(end / 3600, kept / (config.workers * end), repeated, deaths)


def main(config: Config) -> None:
    """Print the table."""
    parts = -(-config.images // config.rows_per_part)
    ways = {
        "one shard per worker": (config.workers, True),
        "8 shards per worker, from a scheduler": (8 * config.workers, False),
        "single parts from one queue": (parts, False),
    }
    lines = []
    for name, (tasks, is_pinned) in ways.items():
        found = simulate(config, min(tasks, parts), is_pinned=is_pinned)
        numbers = [f"{found.hours:.1f}", f"{100 * found.used:.1f}", f"{found.deaths}", f"{found.repeated:,.0f}"]
        lines.append([name, *numbers])
    ideal = config.images / min(config.rate * config.workers, config.bucket_rate) / 3600
    print(
        f"\n{config.images:,} images, {config.workers} workers of {config.rate:g} images/s, {parts:,} parts; ", end=""
    )
    print(f"{ideal:.1f} hours if all were equal and none died.\n")
    print(table(["", "hours", "time used, %", "deaths", "images predicted twice"], lines))


if __name__ == "__main__":
    main(tyro.cli(Config))
