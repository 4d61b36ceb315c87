"""What this is all for: edge-tunnel's goals, as ratios between systems with as many TLS hops. Called by __main__.py."""

import dataclasses
import math
import operator
from collections.abc import Iterator

from networks import NETWORKS
from results import Results
from workloads import BULK

# Ours, and those that have as many TLS hops.
PAIRS = {"relay": (("edge-tunnel", "relay"), ("edge-tunnel-uds", "relay-1")),
         "haproxy": (("edge-tunnel", "haproxy"), ("edge-tunnel-uds", "haproxy-1")),
         "konnectivity": (("edge-tunnel", "konnectivity"), ("edge-tunnel-uds", "konnectivity-uds"),
                          ("edge-tunnel-uds", "konnectivity-grpc")),
         "rathole": (("edge-tunnel-uds", "rathole"),)}
BULK_GOALS = (("relay", ">=", 0.9), ("haproxy", ">", 1.0), ("rathole", ">=", 1.5), ("konnectivity", ">=", 3.0))
COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le}


@dataclasses.dataclass(frozen=True)
class Goal:
    """Met if every one of its ratios is, and there is one."""

    text: str
    comparison: str
    bound: float
    ratios: dict[str, float]

    @property
    def wanted(self) -> str:
        return f"{self.comparison} {self.bound:g}"

    @property
    def verdict(self) -> str:
        return "yes" if all(COMPARE[self.comparison](ratio, self.bound) for ratio in self.ratios.values()) else "NO"

    def as_json(self) -> dict[str, object]:
        ratios = {name: None if math.isnan(ratio) else ratio for name, ratio in self.ratios.items()}
        return {"goal": self.text, "wanted": self.wanted, "met": self.verdict == "yes", "ratios": ratios}


def judge(results: Results) -> list[Goal]:
    """Those of which there are figures."""
    goals = [*_bulk(results), *_first_byte(results), *_interleaved(results), *_long_way(results), *_requests(results)]
    return [goal for goal in goals if goal.ratios]


def _bulk(results: Results) -> Iterator[Goal]:
    for peer, comparison, bound in BULK_GOALS:
        for ours, theirs in PAIRS[peer]:
            rate = {name: _ratio(results, "loopback", name, "gbit_per_s", ours, theirs) for name in BULK}
            yield Goal(f"bulk: {ours} / {theirs}, in total", comparison, bound, _known(rate))
            # CPU seconds for a GiB, the other way round: how many GiB for a CPU second.
            work = {name: _ratio(results, "loopback", name, "cpu", theirs, ours) for name in BULK}
            yield Goal(f"bulk: {ours} / {theirs}, per CPU second", comparison, bound, _known(work))


def _first_byte(results: Results) -> Iterator[Goal]:
    """At most 1.3 times haproxy's, and one round trip more, which is none on loopback."""
    for ours, theirs in PAIRS["haproxy"]:
        ratios = {}
        for network in NETWORKS.values():
            own, other = (_median(results, network.name, "first-byte", name, "p50_us") for name in (ours, theirs))
            if own is not None and other:
                ratios[network.name] = (own - network.rtt * 1000) / other
        yield Goal(f"first byte: ({ours} - one round trip) / {theirs}, p50", "<=", 1.3, ratios)


def _interleaved(results: Results) -> Iterator[Goal]:
    """Not where there are outages: whether one is among the slowest hundredth is a matter of how often they come."""
    for ours in ("edge-tunnel", "edge-tunnel-uds"):
        ratios = {}
        for network in (name for name in NETWORKS if not NETWORKS[name].outage):
            quiet = _median(results, network, "ping", ours, "p99_us")
            for workload in ("interleaved-down", "interleaved-up"):
                busy = _median(results, network, workload, ours, "p99_us")
                if quiet and busy is not None:
                    ratios[f"{workload}, {network}"] = busy / quiet
        yield Goal(f"ping-pong beside bulk / quiet: {ours}, p99", "<=", 5, ratios)


def _long_way(results: Results) -> Iterator[Goal]:
    """What is left of 1 Gbit/s for bytes, of which headers of TCP, IP and TLS take some 6 %."""
    for ours in ("edge-tunnel", "edge-tunnel-uds"):
        rates = {name: _median(results, "wan", name, ours, "gbit_per_s") for name in ("bulk-1-down", "bulk-1-up")}
        yield Goal(f"one stream fills 1 Gbit/s at 50 ms: {ours}", ">=", 0.9, _known(rates))


def _requests(results: Results) -> Iterator[Goal]:
    for ours, theirs in PAIRS["konnectivity"]:
        ratio = _ratio(results, "loopback", "requests", "per_s", ours, theirs)
        yield Goal(f"new connections a second: {ours} / {theirs}", ">=", 3, _known({"requests": ratio}))
        work = _ratio(results, "loopback", "requests", "cpu", theirs, ours)
        yield Goal(f"new connections per CPU second: {ours} / {theirs}", ">=", 3, _known({"requests": work}))


def _ratio(results: Results, network: str, workload: str, key: str, over: str, under: str) -> float | None:
    first, second = (_median(results, network, workload, name, key) for name in (over, under))
    return first / second if first is not None and second else None


def _median(results: Results, network: str, workload: str, system: str, key: str) -> float | None:
    """None if it was not measured. Not a number, which meets no goal, if one of its runs has failed."""
    runs, good = results.of(network, workload, system), results.good(network, workload, system)
    return math.nan if len(good) < len(runs) else results.median(network, workload, system, key)


def _known(ratios: dict[str, float | None]) -> dict[str, float]:
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}
