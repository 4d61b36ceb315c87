"""Faults in random order from a seed, in bouts; after each, all must work again within a bound. Called by __main__.py.

The seed says what happens, to whom, how long, and after which pause. It does not say what the kernel and the programs
make of it: a run with the same seed has the same faults, not the same packets.
"""

import contextlib
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from client import Client, failures, said, told
from cluster import DRAIN_DELAY, DRAIN_TIMEOUT, EDGES, GATEWAYS, MEMBERS, Cluster, Part
from netlab.lab import Failed, Host, until
from record import Record
from report import Skipped, check
from traffic import FREEZE, Outcome

RATE = 120
STREAMS = 12
BOUT, PAUSE = 10.0, 1.0
# After the last fault has been undone, until every node is reached through every gateway. An edge waits for four
# seconds at most between two attempts, a link that is dead is noticed after four, and a lease ends after five.
CALM = 20
# For so long after that, at least, requests go on before the next bout, and none of them may fail.
QUIET = 3.0
# (per cent of loss, milliseconds of delay) of an edge's access, at which its share of the load still passes in time.
ACCESS = ((0.2, 100), (1, 40), (2, 15), (0, 200))
BACKBONE = ((0.1, 20), (0.5, 10), (1, 5), (0, 40))
# How long a request may have been under way when its edge was killed.
SHORT = 1.0

Fault = Callable[[float], None]


class Chaos:
    """For one directory, on a cluster that has been started."""

    def __init__(self, cluster: Cluster, client: Client, record: Record, seed: int, seconds: float) -> None:
        self.cluster, self.client, self.record = cluster, client, record
        # Its own random numbers: what the cases before have used does not matter.
        self.random, self.seconds = random.Random(f"{seed} {cluster.directory}"), seconds
        self.busy: set[str] = set()
        self.turn = threading.Condition()
        self.problems: list[str] = []
        self.faults: Counter[str] = Counter()
        self.begun: float = 0
        self.calmed: list[float] = []
        self.quiet: list[Outcome] = []

    def run(self) -> str:
        """All of it; what was wrong is in the other cases, which ask for it."""
        self.begun = time.time()
        bouts = max(1, round(self.seconds / (BOUT + 5)))
        for number in range(1, bouts + 1):
            self.client.load(RATE)
            self.client.streams(STREAMS)
            try:
                self._bout()
                self._calm_down(number)
            finally:
                self.client.end_streams()
                outcomes = self.client.settle(self.begun)
        check(not self.problems, "; ".join(self.problems))
        bad = failures(outcomes)
        faults = ", ".join(f"{count} {name}" for name, count in self.faults.most_common())
        return f"{sum(self.faults.values())} faults ({faults}); {len(outcomes)} requests, {len(outcomes) - len(bad)} " \
               f"delivered, failed loudly: {told(bad)}"

    def recovered(self) -> str:
        self._must_have_run()
        check(self.calmed, "there was no calm")
        return f"after {', '.join(f'{took:.1f}' for took in self.calmed)} s, {CALM} s allowed"

    def quiet_between(self) -> str:
        """Of the requests that began when all was well again; all have ended before the next fault."""
        self._must_have_run()
        bad = failures(self.quiet)
        first = f"; the first at {bad[0].begun:.3f}, {bad[0].node}: {said(bad[0])}" if bad else ""
        check(not bad, f"{len(bad)} of {len(self.quiet)} requests failed: {told(bad)}{first}")
        check(len(self.quiet) > len(self.calmed) * RATE * QUIET / 2, f"only {len(self.quiet)} requests were sent")
        return f"{len(self.quiet)} requests, none failed"

    def _must_have_run(self) -> None:
        if not self.begun:
            raise Skipped("the chaos was not run")

    # A bout.

    def _bout(self) -> None:
        begun, running = time.monotonic(), []
        for at, name, victims, fault, seconds in self._plan():
            time.sleep(max(0.0, begun + at - time.monotonic()))
            self.faults[name] += 1
            thread = threading.Thread(target=self._do, args=(name, victims, fault, seconds))
            thread.start()
            running.append(thread)
        for thread in running:
            thread.join()

    def _plan(self) -> list[tuple[float, str, set[str], Fault, float]]:
        """Drawn before any of it is done, so that how long something takes changes nothing."""
        plan, at, free = [], 0.0, dict[str, float]()
        while at < BOUT:
            name, victims, fault, seconds = self._draw()
            if all(free.get(victim, 0) <= at for victim in victims):
                plan.append((at, name, victims, fault, seconds))
                free |= {victim: at + seconds + 0.5 for victim in victims}
                at += self.random.expovariate(1 / PAUSE)
        return plan

    def _do(self, name: str, victims: set[str], fault: Fault, seconds: float) -> None:
        with self.turn:
            # What took longer than was thought comes first.
            self.turn.wait_for(lambda: not victims & self.busy)
            self.busy |= victims
        try:
            fault(seconds)
        except Exception as failure:  # Whatever it is, the next bout must not begin with half a fault.
            self.problems.append(f"{name} of {', '.join(sorted(victims))}: {failure}")
        finally:
            with self.turn:
                self.busy -= victims
                self.turn.notify_all()

    def _draw(self) -> tuple[str, set[str], Fault, float]:
        """What, to whom, how, and how long."""
        kinds = {
            self._kill_gateway: 4, self._kill_two_gateways: 1, self._restart_gateway: 2, self._freeze_gateway: 2,
            self._part_gateways: 2, self._part_edge: 2, self._kill_edge: 3, self._worse_access: 3,
            self._worse_backbone: 2}
        if self.cluster.etcd:
            kinds |= {self._kill_member: 2, self._kill_etcd: 1, self._part_from_etcd: 2}
        return self.random.choices(list(kinds), list(kinds.values()))[0]()

    # The faults. Each draws all it needs, and returns what is done.

    def _kill_gateway(self) -> tuple[str, set[str], Fault, float]:
        name = self.random.choice(GATEWAYS)
        victims = {name} | self._mostly_alone()
        return "gateway killed", victims, self._killing(self.cluster.gateways[name]), self.random.uniform(0.2, 4)

    def _mostly_alone(self) -> set[str]:
        """What keeps other gateways from being killed at the same time, four times in five."""
        return {"gateways"} if self.random.random() < 0.8 else set()

    def _kill_two_gateways(self) -> tuple[str, set[str], Fault, float]:
        names = self.random.sample(GATEWAYS, 2)

        def fault(seconds: float) -> None:
            with contextlib.ExitStack() as stack:
                for name in names:
                    stack.enter_context(self._killed(self.cluster.gateways[name]))
                time.sleep(seconds)
        return "two gateways killed", {*names, "gateways"}, fault, self.random.uniform(0.5, 4)

    def _restart_gateway(self) -> tuple[str, set[str], Fault, float]:
        name = self.random.choice(GATEWAYS)

        def fault(seconds: float) -> None:
            gateway = self.cluster.gateways[name]
            # In the first moments of its life, SIGTERM just ends a process.
            until(f"{name} is up", 10, gateway.answers)
            with self.record.event(name, "SIGTERM"):
                try:
                    gateway.stop(DRAIN_DELAY + DRAIN_TIMEOUT + 10)
                    time.sleep(seconds)
                finally:
                    gateway.start()
        return "gateway restarted", {name, "restarts"}, fault, self.random.uniform(0, 1)

    def _freeze_gateway(self) -> tuple[str, set[str], Fault, float]:
        name = self.random.choice(GATEWAYS)

        def fault(seconds: float) -> None:
            gateway = self.cluster.gateways[name]
            with self.record.event(name, "SIGSTOP"):
                gateway.send(signal.SIGSTOP)
                time.sleep(seconds)
                gateway.send(signal.SIGCONT)
        return "gateway frozen", {name} | self._mostly_alone(), fault, self.random.uniform(0.5, FREEZE)

    def _part_gateways(self) -> tuple[str, set[str], Fault, float]:
        one, other = self.random.sample(GATEWAYS, 2)
        return "gateways parted", {f"{min(one, other)} {max(one, other)}"}, self._parting(one, [other]), \
            self.random.uniform(1, 6)

    def _part_edge(self) -> tuple[str, set[str], Fault, float]:
        """From one gateway, or from the balancer, by which all edges come at first and some always."""
        edge = self.random.choice(EDGES)
        gateway = self.random.choice((*GATEWAYS, "balancer"))
        return "edge parted", {f"{edge}'s way"}, self._parting(edge, [gateway]), self.random.uniform(1, 6)

    def _kill_edge(self) -> tuple[str, set[str], Fault, float]:
        name = self.random.choice(EDGES)
        return "edge killed", {name}, self._killing(self.cluster.edges[name]), self.random.uniform(0.1, 3)

    def _kill_member(self) -> tuple[str, set[str], Fault, float]:
        name = self.random.choice(MEMBERS)
        return "etcd member killed", {name}, self._killing(self.cluster.etcd[name]), self.random.uniform(0.2, 4)

    def _kill_etcd(self) -> tuple[str, set[str], Fault, float]:
        def fault(seconds: float) -> None:
            with contextlib.ExitStack() as stack:
                for member in self.cluster.etcd.values():
                    stack.enter_context(self._killed(member))
                time.sleep(seconds)
        return "all of etcd killed", set(MEMBERS), fault, self.random.uniform(1, 6)

    def _part_from_etcd(self) -> tuple[str, set[str], Fault, float]:
        name = self.random.choice(GATEWAYS)
        return "gateway parted from etcd", {f"{name} and etcd"}, self._parting(name, MEMBERS), self.random.uniform(1, 8)

    def _worse_access(self) -> tuple[str, set[str], Fault, float]:
        name = self.random.choice(EDGES)
        return "worse access", {f"{name}'s access"}, self._worsening(name, *self.random.choice(ACCESS)), \
            self.random.uniform(2, 8)

    def _worse_backbone(self) -> tuple[str, set[str], Fault, float]:
        name = self.random.choice(GATEWAYS)
        return "worse backbone", {f"{name}'s access"}, self._worsening(name, *self.random.choice(BACKBONE)), \
            self.random.uniform(2, 6)

    def _killing(self, part: Part) -> Fault:
        def fault(seconds: float) -> None:
            with self._killed(part):
                time.sleep(seconds)
        return fault

    @contextlib.contextmanager
    def _killed(self, part: Part) -> Iterator[None]:
        with self.record.event(part.name, "kill -9"):
            part.kill()
            try:
                yield
            finally:
                part.start()

    def _parting(self, name: str, others: tuple[str, ...] | list[str]) -> Fault:
        hosts = self.cluster.hosts

        def fault(seconds: float) -> None:
            to = "etcd" if len(others) > 1 else others[0]
            pairs: list[tuple[Host, Host]] = [(hosts[name], hosts[other]) for other in others]
            with self.record.event("network", f"{name} | {to}"):
                for pair in pairs:
                    self.cluster.lab.partition(*pair)
                time.sleep(seconds)
                for pair in pairs:
                    self.cluster.lab.heal(*pair)
        return fault

    def _worsening(self, name: str, loss: float, delay: float) -> Fault:
        link = self.cluster.access[name]

        def fault(seconds: float) -> None:
            before = link.a.conditions
            with self.record.event("network", f"{name} {delay} ms, {loss} %"):
                link.set(loss=loss, delay=delay)
                time.sleep(seconds)
                link.set(loss=before.loss, delay=before.delay)
        return fault

    # Calm.

    def _calm_down(self, number: int) -> None:
        begun = time.monotonic()
        with self.record.event("calm", f"bout {number}"):
            try:
                until("every node is reached through every gateway", CALM, self._all_reachable, 0.2)
                reached = time.time()
                self.calmed.append(time.monotonic() - begun)
                self.cluster.wait_for_links()
                # They hold links that edges have replaced.
                self.client.end_streams()
                until("nothing that is stale is left", CALM, self._nothing_stale, 0.5)
                time.sleep(max(0.0, reached + QUIET - time.time()))
                self.quiet += self.client.settle(reached)
            except Failed as failure:
                self.problems.append(f"after bout {number}: {failure}")

    def _all_reachable(self) -> bool:
        # As long as a gateway is starting, asking the others would only take time from it.
        gateways = [self.cluster.gateways[name] for name in GATEWAYS]
        if not all(gateway.alive() and gateway.ready() for gateway in gateways):
            return False
        self.client.all_reachable(GATEWAYS)
        return True

    def _nothing_stale(self) -> bool:
        """No request is handed to a gateway in vain, and etcd holds nothing but the links that there are."""
        def vain() -> float:
            return sum(self.cluster.over_gateways("tunnel_server_handed_to_peers_total", label)
                       for label in ("stale", "failed"))
        before = vain()
        self.client.all_reachable(GATEWAYS)
        stale = vain() - before
        if stale:
            raise AssertionError(f"{stale:.0f} requests were handed on in vain")
        if self.cluster.etcd:
            gateways, holders = self.cluster.keys()
            links = {name: self.cluster.gateways[name].metric("tunnel_server_links") for name in GATEWAYS}
            written = Counter(gateway for _, gateway in holders)
            if gateways != set(GATEWAYS) or any(written[name] != links[name] for name in links):
                raise AssertionError(f"in etcd are gateways {sorted(gateways)} and links {sorted(holders)}, "
                                     f"and the gateways have {links} links")
        return True


def truncated(cluster: Cluster, record: Record, since: float) -> str:
    """What the targets saw since then. When an edge is killed, the kernel ends its connections as if it had done so
    itself: in the time after that, a short one is nobody's fault, and its client has had an error."""
    seen = cluster.cut_short(since)
    unexplained = [f"{node}: {line}" for when, node, line in seen
                   if not record.killed(node, when, SHORT)]
    check(not unexplained, "; ".join(unexplained[:5]))
    return f"{len(seen)} when their edge was killed" if seen else ""
