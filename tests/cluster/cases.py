"""The calm cases: one thing happens at a time, and what it may cost is known. Called by __main__.py, before chaos."""

import itertools
import re
import statistics
import time
from datetime import datetime

from client import Client, counts, failures, ingress, said, told
from cluster import DRAIN_DELAY, DRAIN_TIMEOUT, EDGES, FOURTH, GATEWAYS, MEMBERS, REBALANCE, Cluster, Daemon, total
from netlab.lab import until
from record import Record
from report import Skipped, check

# Requests a second; each has a connection, with both sides' certificates, of its own.
RATE = 100
# After a gateway was killed: what was under way is lost, and no more than that for longer.
RECOVERY = 3
NEWCOMERS = 40
KNOWN = 1.0


class Cases:
    """For one directory, on a cluster that has been started."""

    def __init__(self, cluster: Cluster, client: Client, record: Record) -> None:
        self.cluster, self.client, self.record = cluster, client, record
        self.held: list[str] = []
        self.told_to_leave: float = 0

    def every_node_through_every_gateway(self) -> str:
        begun = time.monotonic()
        self.client.all_reachable([*GATEWAYS, "balancer"])
        return f"{len(EDGES)} nodes, all {self.cluster.hosts['edge-1'].sh('hostname -I').split()[-1]}, through " \
               f"{len(GATEWAYS)} gateways and the balancer: {time.monotonic() - begun:.1f} s"

    def one_hop_at_most(self) -> str:
        """One request at a time, so that whoever hands it on is seen. Again, if links have moved meanwhile."""
        for _ in range(5):
            until("the links have settled", 30, lambda: self._calm(1), 0.1)
            before = self._moved()
            try:
                return self._one_hop_at_most()
            except AssertionError:
                if self._moved() == before:
                    raise
        raise AssertionError("links moved all the time")

    def _one_hop_at_most(self) -> str:
        def both() -> tuple[float, float]:
            samples = [self.cluster.gateways[name].metrics() for name in GATEWAYS]
            return (sum(total(sample, "tunnel_server_handed_to_peers_total") for sample in samples),
                    sum(total(sample, "tunnel_server_forwarded_total") for sample in samples))
        hops = {}
        before = both()
        for gateway, node in itertools.product(GATEWAYS, EDGES):
            outcome = self.client.once(ingress(gateway), node)
            check(outcome.result == "delivered", f"{node} through {gateway}: {said(outcome)}")
            after = both()
            handed, forwarded = after[0] - before[0], after[1] - before[1]
            check(handed == forwarded and handed <= 1, f"{node} through {gateway}: handed on {handed:.0f} times, "
                  f"{forwarded:.0f} times forwarded")
            hops[gateway, node], before = int(handed), after
        for node in EDGES:
            without = sum(hops[gateway, node] for gateway in GATEWAYS)
            check(without == 1, f"{node} has two links, and {without} of the three gateways had none")
        return f"{sum(hops.values())} of {len(hops)} requests were handed on, each once"

    def rolling_restart(self) -> str:
        """As Kubernetes does it: the next one as soon as the last is ready. Long streams only through the first."""
        begun = time.time()
        self.client.load(RATE)
        time.sleep(1)
        self.held = self.client.hold(GATEWAYS[0], EDGES)
        time.sleep(1)
        times = []
        for name in GATEWAYS:
            gateway, told_at = self.cluster.gateways[name], time.time()
            if name == GATEWAYS[0]:
                self.told_to_leave = told_at
            with self.record.event(name, "SIGTERM"):
                gateway.stop(DRAIN_DELAY + DRAIN_TIMEOUT + 10)
                times.append(time.time() - told_at)
            gateway.start()
            self.cluster.wait_ready(name)
        ready = time.time()
        self.cluster.wait_for_links()
        linked = time.time() - ready
        time.sleep(2)
        left = ", ".join(f"{took:.1f}" for took in times)
        return f"{self._none_failed(begun)}; the gateways left after {left} s; all edges had both links {linked:.1f} " \
               "s after the last was back"

    def _none_failed(self, begun: float) -> str:
        outcomes = self.client.settle(begun)
        bad = failures(outcomes)
        first = f", the first at {bad[0].begun - begun:.1f} s: {said(bad[0])}" if bad else ""
        check(not bad, f"{len(bad)} of {len(outcomes)} requests failed: {told(bad)}{first}")
        check(len(outcomes) > RATE, f"only {len(outcomes)} requests were sent")
        return f"{len(outcomes)} requests, none failed"

    def long_streams_end_at_the_deadline(self) -> str:
        """Those of the rolling restart: through the first gateway, by its own links and by way of its peers."""
        if not self.held:
            raise Skipped("the rolling restart, whose streams these are, was not run or did not begin")
        ended = [self.client.result(tag) for tag in self.held]
        deadline = self.told_to_leave + DRAIN_DELAY + DRAIN_TIMEOUT
        after = [outcome.ended - self.told_to_leave for outcome in ended]
        for outcome in ended:
            check(outcome.result == "failed", f"{outcome.node}: {said(outcome)}, and not cut at the deadline")
            check(-0.5 < outcome.ended - deadline < 2,
                  f"{outcome.node}: ended {outcome.ended - self.told_to_leave:.1f} s after SIGTERM ({outcome.why}), "
                  f"and the deadline was at {DRAIN_DELAY + DRAIN_TIMEOUT} s")
        return f"{len(ended)} streams, {min(after):.1f} to {max(after):.1f} s after SIGTERM"

    def a_gateway_is_killed(self) -> str:
        name, begun = GATEWAYS[1], time.time()
        gateway = self.cluster.gateways[name]
        self.client.load(RATE)
        time.sleep(3)
        with self.record.event(name, "kill -9"):
            killed = time.time()
            gateway.kill()
            time.sleep(RECOVERY + 3)
        gateway.start()
        self.cluster.wait_ready(name)
        self.cluster.wait_for_links()
        time.sleep(1)
        outcomes = self.client.settle(begun)
        bad = failures(outcomes)
        check(not [one for one in bad if one.ended < killed], f"failures before the kill: {told(bad)}")
        # By when the last one began that failed.
        recovered = max((one.begun - killed for one in bad), default=0)
        words = f"{len(bad)} of {len(outcomes)} requests failed: {told(bad)}; the last began {recovered:.2f} s after " \
                "the kill"
        check(recovered < RECOVERY, words)
        return words

    def new_links_are_known(self) -> str:
        """From the line in the log of the gateway that has the link, until each of the others connects."""
        with self.record.event("edges", f"{NEWCOMERS} new nodes"):
            newcomers = self.cluster.newcomers(NEWCOMERS, f"new-{self.cluster.directory}")
            try:
                # Steadily, as an autoscaler would; under the load of the others.
                begun = time.time()
                self.client.load(RATE / 2)
                took = [took for edge in newcomers for took in self._until_known(edge)]
                self._none_failed(begun)
            finally:
                self.cluster.forget(newcomers)
        p50, p99 = statistics.median(took), statistics.quantiles(took, n=100, method="inclusive")[98]
        words = f"{len(took)} times, in ms: median {p50 * 1000:.0f}, p99 {p99 * 1000:.0f}, worst {max(took) * 1000:.0f}"
        check(p99 < KNOWN, words)
        return words

    def _until_known(self, edge: Daemon) -> list[float]:
        """Of one node, at each of the gateways that have no link to it."""
        asked: dict[str, str] = {}
        answered: dict[str, float] = {}
        edge.start()

        def known() -> bool:
            """Asks each gateway again and again, one question at a time, until it has connected."""
            for name in GATEWAYS:
                if name in answered:
                    continue
                outcome = self.client.tagged.get(asked[name]) if name in asked else None
                if outcome and outcome.result == "delivered":
                    answered[name] = outcome.answered
                elif outcome or name not in asked:
                    asked[name] = self.client.start(ingress(name), edge.name)
            return len(answered) == len(GATEWAYS)
        until(f"{edge.name} is known everywhere", 20, known, 0.01)
        home, linked = self._link_up(edge.name)
        return [max(0.0, answered[name] - linked) for name in GATEWAYS if name != home]

    def _link_up(self, node: str) -> tuple[str, float]:
        """The first gateway that says so, and when."""
        def said_so() -> tuple[float, str] | None:
            found = []
            for name in GATEWAYS:
                log = self.cluster.gateways[name].log.read_text()
                if line := re.search(rf"^(\S+) .*link up node={node} ", log, re.M):
                    found.append((datetime.fromisoformat(line[1]).timestamp(), name))
            return min(found, default=None)
        when, name = until(f"the log of a gateway says that {node} is linked", 10, said_so)
        return name, when

    def etcd_is_away(self) -> str:
        """Known routes go on, a node that comes is served where it is linked, and all know it when etcd is back."""
        begun = time.time()
        edge = self.cluster.newcomers(1, "without-etcd")[0]
        members = self.cluster.etcd.values()
        try:
            self.client.load(RATE)
            with self.record.event("etcd", "all three killed"):
                for member in members:
                    member.kill()
                time.sleep(3)
                edge.start()
                home, _ = self._link_up(edge.name)
                served = self.client.once(ingress(home), edge.name)
                check(served.result == "delivered", f"{edge.name} is linked to {home}, which says: {said(served)}")
                elsewhere = [self.client.once(ingress(name), edge.name) for name in GATEWAYS if name != home]
                check(counts(elsewhere)["failed"] == 2, f"without etcd, {edge.name} is known to others: is it in use?")
                # Longer than a lease, which nobody can renew now.
                time.sleep(6)
            for member in members:
                member.start()
            back = time.time()
            self.cluster.wait_for_etcd()
            works = time.time()
            until("every gateway knows the new node", 20,
                  lambda: self.client.all_reachable(GATEWAYS, [edge.name]) or True)
            known = time.time()
            words = self._none_failed(begun)
        finally:
            for member in members:
                if not member.alive():
                    member.start()
            self.cluster.forget([edge])
        return f"{words} while {len(MEMBERS)} members were away; all knew the new node {known - works:.1f} s after " \
               f"etcd worked again, {known - back:.1f} s after its start"

    def a_gateway_joins(self) -> str:
        """And leaves again, in order."""
        fourth, begun = self.cluster.gateways[FOURTH], time.time()
        moved = self._moved()
        self.client.load(RATE)
        with self.record.event(FOURTH, "joins"):
            fourth.start()
            self.cluster.wait_ready(FOURTH)
            joined = time.time()
            until("the new gateway has links", 4 * REBALANCE + 10,
                  lambda: fourth.metric("tunnel_server_links") > 0, 0.2)
            first = time.time() - joined
            until("the links have settled", 30, lambda: self._calm(2), 0.2)
            links = fourth.metric("tunnel_server_links")
            moved = self._moved() - moved
            self.client.all_reachable([*GATEWAYS, FOURTH])
        with self.record.event(FOURTH, "SIGTERM"):
            fourth.stop()
        self.cluster.wait_for_links()
        words = self._none_failed(begun)
        check(links < len(EDGES), f"all {len(EDGES)} edges have moved to it")
        return f"{words}; its first link came after {first:.1f} s, then {links:.0f} of {len(EDGES)} edges had one; " \
               f"{moved:.0f} moves"

    def _moved(self) -> float:
        return sum(edge.metric("tunnel_edge_links_moved_total") for edge in self.cluster.edges.values())

    def _calm(self, seconds: float) -> bool:
        """Whether no link has moved for a while."""
        before = self._moved(), self.cluster.over_gateways("tunnel_server_links")
        time.sleep(seconds)
        settled = self.cluster.settled()
        links = self.cluster.over_gateways("tunnel_server_links")
        return settled and links == 2 * len(EDGES) and before == (self._moved(), links)
