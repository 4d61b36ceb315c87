"""The client, seen from the rig: tells the program on the client's host what to send, and keeps how each request went.
Used by cases.py and chaos.py."""

import itertools
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from cluster import EDGES, INGRESS, Cluster
from netlab.lab import Failed, until
from report import check
from traffic import DEADLINE, Count, Outcome

BALANCER = f"balancer:{INGRESS}"


def ingress(gateway: str) -> str:
    return f"{gateway}:{INGRESS}"


class Client:
    """The control plane. Used within `with`: what it has begun has ended after that, and is counted."""

    def __init__(self, cluster: Cluster) -> None:
        self.outcomes: list[Outcome] = []
        self.tagged: dict[str, Outcome] = {}
        self.counted: dict[str, Count] = {}
        self.tags = map(str, itertools.count(1))
        pki = cluster.pki / "control-plane"
        program = Path(__file__).with_name("traffic.py")
        files = (pki / name for name in ("ca.crt", "client.crt", "client.key"))
        argv = [sys.executable, "-B", program, "client", *files]
        self.log = open(cluster.logs / "client.log", "ab")
        self.process = subprocess.Popen(
            cluster.hosts["client"].argv(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True, start_new_session=True)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(DEADLINE + 20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Failed("the client still has requests without an end, long after their deadline") from None
        self.reader.join()
        if self.process.returncode != 0:
            raise Failed(f"the client has ended with {self.process.returncode}: see client.log")

    def _read(self) -> None:
        for line in self.process.stdout:
            words = json.loads(line)
            if "kind" not in words:
                self.counted[words["tag"]] = Count(**words)
                continue
            outcome = Outcome(**words)
            self.outcomes.append(outcome)
            if outcome.tag:
                self.tagged[outcome.tag] = outcome

    def _say(self, *words: object) -> None:
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def load(self, rate: float, address: str = BALANCER, nodes: Iterable[str] = EDGES) -> None:
        """Short requests, so many a second, from now on."""
        self._say("rate", address, rate, *nodes)

    def streams(self, count: int) -> None:
        """So many echoes at all times, from now on, until `end_streams`."""
        self._say("streams", count, BALANCER, *EDGES)

    def end_streams(self) -> None:
        self._say("end-streams")

    def hold(self, gateway: str, nodes: Iterable[str]) -> list[str]:
        """An echo to each of the nodes; their tags."""
        tags = []
        for node in nodes:
            tags.append(next(self.tags))
            self._say("hold", tags[-1], ingress(gateway), node)
        return tags

    def start(self, address: str, node: str) -> str:
        """Begins one request; its tag."""
        tag = next(self.tags)
        self._say("once", tag, address, node)
        return tag

    def result(self, tag: str, seconds: float = DEADLINE + 5) -> Outcome:
        return until("the request has ended", seconds, lambda: self.tagged.get(tag), 0.005)

    def once(self, address: str, node: str) -> Outcome:
        return self.result(self.start(address, node))

    def each(self, pairs: Iterable[tuple[str, str]]) -> list[Outcome]:
        """One request for each (gateway, node), all at the same time."""
        tags = [self.start(ingress(gateway), node) for gateway, node in pairs]
        return [self.result(tag) for tag in tags]

    def all_reachable(self, gateways: Iterable[str], nodes: Iterable[str] = EDGES) -> None:
        """Every node, through every one of these gateways, or an error that names those that were not."""
        outcomes = self.each(list(itertools.product(gateways, nodes)))
        bad = [outcome for outcome in outcomes if outcome.result != "delivered"]
        if bad:
            raise Failed("; ".join(f"{one.node} through {one.address}: {said(one)}" for one in bad[:3])
                         + (f" and {len(bad) - 3} more" if len(bad) > 3 else ""))

    def short(self, since: float, before: float | None = None) -> list[Outcome]:
        """The load's requests that began in that time and have ended."""
        return [one for one in list(self.outcomes) if one.of_load
                and one.begun >= since and (before is None or one.begun < before)]

    def settle(self, since: float) -> list[Outcome]:
        """Ends the load, waits for its last request, and gives those that began since then."""
        self.load(0)
        until("all short requests have ended", DEADLINE + 2, lambda: self._count().load == 0)
        return self.short(since)

    def _count(self) -> Count:
        tag = next(self.tags)
        self._say("count", tag)
        return until("the client has counted", 10, lambda: self.counted.get(tag), 0.005)

    def accounted(self) -> str:
        """After the end: each request that has begun has ended, and was told here."""
        count = self.counted.get("end")
        check(count, "the client has ended without a last count: see client.log")
        words = f"{count.begun} have begun, {count.ended} have ended, {len(self.outcomes)} were told"
        check(count.begun == count.ended == len(self.outcomes), words)
        return words


def said(outcome: Outcome) -> str:
    return f"{outcome.result} {outcome.why}".strip()


def counts(outcomes: Iterable[Outcome]) -> Counter[str]:
    return Counter(outcome.result for outcome in outcomes)


def failures(outcomes: Iterable[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.result != "delivered"]


def told(outcomes: Iterable[Outcome]) -> str:
    """Failures by cause, for people."""
    causes = Counter(cause(outcome) for outcome in failures(outcomes))
    return ", ".join(f"{count} {name}" for name, count in causes.most_common(5)) or "none"


# By the words that the answer, the kernel or traffic.py has for it; the first that fits.
CAUSES = (("has no link", "node has no link"), ("503", "503 other"), ("504", "504"), ("502", "502"), ("404", "404"),
          ("not accepted", "not accepted"), ("TLS's end", "cut"), ("ended before", "cut"), ("reset", "reset"),
          ("refused", "not accepted"), ("TLS", "TLS"))


def cause(outcome: Outcome) -> str:
    """Of a failure, one of a few names."""
    if outcome.result in ("WRONG", "HUNG"):
        return outcome.result
    return next((name for words, name in CAUSES if words in outcome.why), "other")
