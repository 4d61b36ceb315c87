"""What is driven through each system, and what is looked at. Used by __main__.py, report.py and goals.py."""

import dataclasses

from networks import NETWORKS


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number of the driver's, as a column."""

    key: str
    title: str
    digits: int
    scale: float = 1


@dataclasses.dataclass(frozen=True)
class Workload:
    """The first figure is the one that systems are compared by."""

    name: str
    title: str
    kind: str
    """As the driver calls it."""
    figures: tuple[Figure, ...]
    per: str
    """What CPU seconds are counted for: GiB, or a thousand of something, or 1000 s for what does nothing."""
    words: tuple[str, ...] = ()
    lab: bool = True
    """Whether the network makes a difference to it."""
    least: float = 0
    """Seconds that it takes for its figures to say something: a 99th percentile needs some hundreds."""

    def on(self, network: str) -> bool:
        return self.lab or not NETWORKS[network].link


RATE = Figure("gbit_per_s", "Gbit/s", 3)
MEDIAN, HIGH, HIGHEST = Figure("p50_us", "p50 us", 0), Figure("p99_us", "p99 us", 0), Figure("p999_us", "p99.9 us", 0)
COUNT = Figure("count", "count", 0)
BULK = tuple(f"bulk-{streams}-{direction}" for direction in ("down", "up") for streams in (1, 8, 64))


def _bulk(name: str) -> Workload:
    _, streams, direction = name.split("-")
    title = f"bulk bytes {direction}, on {streams} stream{'' if streams == '1' else 's'}"
    return Workload(name, title, "bulk", (RATE,), "GiB", ("--streams", streams, "--direction", direction))


WORKLOADS = {workload.name: workload for workload in (
    *map(_bulk, BULK),
    Workload("ping", "64 bytes to and fro on one stream", "ping", (HIGH, MEDIAN, HIGHEST, COUNT), "1000 pings"),
    *(Workload(f"interleaved-{direction}", f"64 bytes to and fro while 8 streams of bulk bytes go {direction}",
               "interleaved", (HIGH, MEDIAN, HIGHEST, COUNT, RATE), "GiB", ("--streams", "8", "--direction", direction), least=3)
      for direction in ("down", "up")),
    Workload("first-byte", "from nothing to the first byte of the target's answer, one after the other", "first-byte",
             (MEDIAN, HIGH, COUNT), "1000 streams"),
    Workload("requests", "64 bytes there, 1 KiB back, each on a stream of its own, 16 at a time", "requests",
             (Figure("per_s", "per s", 0), MEDIAN, HIGH), "1000 requests",
             ("--streams", "16"), lab=False),
    Workload("idle", "1,000 streams that do nothing", "idle",
             (Figure("pss_mib", "PSS MiB in all", 1), Figure("kib_a_stream", "KiB more a stream", 1)), "1000 s",
             ("--streams", "1000"), lab=False),
)}
