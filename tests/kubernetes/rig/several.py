"""What must work with three gateways behind a load balancer, one of which may come or go at any time: point 8."""

import re
import threading
import time
from typing import NamedTuple

from cases import uptime
from lab import Failed, check, until

EXPECTED = {
    "gateway": [
        "Namespace/edge-tunnel", "ServiceAccount/gateway", "ClusterRole/edge-tunnel-gateway",
        "ClusterRoleBinding/edge-tunnel-gateway", "ConfigMap/gateway-HASH", "Service/gateway", "Service/gateway-ingress",
        "Service/gateway-peers", "Deployment/gateway", "PodDisruptionBudget/gateway", "NetworkPolicy/gateway"],
    "edge": ["Namespace/edge-tunnel-edges", "ConfigMap/edge-HASH", "DaemonSet/edge"],
}
# The last words of everything that is cut at the end of a drain.
LAST_WORDS = 20


class Exec(NamedTuple):
    """How one went: when it was begun and ended, and why it failed, if it did."""
    edge: str
    begun: float
    ended: float
    failure: str | None


class Execs:
    """`kubectl exec`, again and again, for as long as the `with` block: on each node one after the other that is over at
    once, and beside them one after the other that takes a second, so that there is always one which runs."""

    def __init__(self, kubectl, edges):
        self.kubectl, self.edges = kubectl, edges
        self.done, self.over = [], threading.Event()
        self.threads = [threading.Thread(target=self.repeat, args=(edge, seconds), daemon=True)
                        for edge in edges for seconds in (0, 1)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        try:
            until("exec works", 10, self.work)
        except AssertionError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def repeat(self, edge, seconds):
        while not self.over.is_set():
            begun, failure = time.monotonic(), None
            try:
                said = self.kubectl.do("exec", f"on-{edge}", "--", "sh", "-c", f"sleep {seconds}; hostname").strip()
                check(said == f"on-{edge}", f"{edge} was asked, and what came is {said!r}")
            except (Failed, AssertionError) as failed:
                failure = str(failed)
            self.done.append(Exec(edge, begun, time.monotonic(), failure))

    def work(self, since=0):
        """Those that were begun later than that and worked, if there is one on each node."""
        worked = [done for done in self.done if done.begun >= since and done.failure is None]
        return worked if {done.edge for done in worked} == set(self.edges) else None

    def failed(self, since=0):
        return [done for done in self.done if done.begun >= since and done.failure is not None]


class Several:
    """The cases. What kubectl does over several gateways is as over one, and stands in cases.py."""

    def __init__(self, lab, cluster, gateways):
        self.lab, self.cluster, self.gateways = lab, cluster, gateways
        self.edges = [edge.name for edge in lab.edges]

    # What is deployed

    def manifests_are_accepted(self):
        """Before anything of it is there, but the namespaces."""
        total = 0
        for folder, expected in EXPECTED.items():
            names = [f"{item['kind']}/{item['metadata']['name']}" for item in self.gateways.manifests(folder)]
            names = [re.sub(r"^(ConfigMap/.*)-[a-z0-9]{10}$", r"\1-HASH", name) for name in names]
            check(sorted(names) == sorted(expected), f"deploy/kubernetes/{folder} has {sorted(names)}")
            total += len(names)
        return f"{total} objects, without a warning"

    def configurations_are_good(self):
        """Those in the ConfigMaps, by the programs' own word; and the pods are given the time that a drain takes."""
        host, edge = self.gateways.hosts["gateway-1"], self.lab.edges[0]
        said = host.do("tunnel-server", "check-config", "--config", "/etc/edge-tunnel/gateway.yaml",
                       "--kubernetes-kubeconfig=/etc/edge-tunnel/gateway.conf")
        timeout, delay = map(seconds_of, re.search(r"drain for +(.*) after a delay of (.*)", said).groups())
        gateway = self.gateways.pod_of("gateway")
        before = gateway["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        needed = before + delay + timeout + LAST_WORDS
        given = gateway["terminationGracePeriodSeconds"]
        check(given > needed, f"a gateway's pod is given {given} s to end, and may need {needed}")
        edge.write("/etc/edge-tunnel/pod.yaml", self.gateways.configuration("edge"))
        edge.write("/etc/edge-tunnel/gateway-ca/ca.crt", edge.read("/etc/edge-tunnel/gateway-ca.crt"))
        edge.do("tunnel-edge", "check-config", "--config", "/etc/edge-tunnel/pod.yaml")
        return f"a gateway's pod is given {given} s to end, and may need {needed}"

    def pods_are_as_they_should_be(self):
        """The gateways' are admitted, and wait for a node of the control plane. The agents' run, one on each node."""
        def waiting():
            pods = self.cluster.get("pods", "-n", "edge-tunnel")["items"]
            why = [(pod["status"].get("conditions") or [{}])[0].get("message", "") for pod in pods]
            check(len(pods) == 3 and all("node affinity" in text for text in why), f"{len(pods)} pods: {why}")
            return why[0]
        until("three pods of gateways that wait", 20, waiting)
        pods = {pod["spec"]["nodeName"]: pod for pod in self.cluster.get("pods", "-n", "edge-tunnel-edges")["items"]}
        check(set(pods) == {edge.name for edge in self.lab.edges}, f"there are agents on {sorted(pods)}")
        for edge in self.lab.edges:
            mounted = [mount["mountPath"] for mount in pods[edge.name]["spec"]["containers"][0]["volumeMounts"]]
            check(not any("serviceaccount" in path for path in mounted), f"an agent has a token: {mounted}")
            container = pods[edge.name]["status"]["containerStatuses"][0]["containerID"].rpartition("/")[2]
            tasks = edge.do("ctr", "-n", "k8s.io", "tasks", "ls").splitlines()
            status = edge.read(f"/proc/{next(line.split()[1] for line in tasks if line.startswith(container))}/status")
            for line in ("CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
                check(line in status, f"the agent on {edge.name} has not {line!r}")
        return "the agents have no capability, no new privileges, a seccomp filter and no token"

    # Gateways come and go

    def next_exec_works(self, kubectl, names):
        """After a gateway was killed: on each node one that is begun after that works within five seconds, and then all."""
        return "; ".join(self.kill_under_execs(kubectl, self.gateways.hosts[name]) for name in names)

    def kill_under_execs(self, kubectl, host):
        with Execs(kubectl, self.edges) as execs:
            killed = time.monotonic()
            self.gateways.kill(host)
            until(f"exec works on each node after {host.name} was killed", 5, lambda: execs.work(killed), 0.02)
            took = time.monotonic() - killed
            # How it goes on.
            time.sleep(max(0, killed + 8 - time.monotonic()))
        self.gateways.start(host)
        self.gateways.wait_for(host)
        self.gateways.wait_for_links()
        late = execs.failed(killed + 5)
        check(not late, f"{len(late)} exec failed after more than 5 s; the first: {late and late[0].failure}")
        return f"{host.name}: works after {took:.1f} s, {len(execs.failed())} of {len(execs.done)} failed"

    def rolling_restart(self, kubectl):
        """As a Deployment does it: the next gateway only when the edges have come back to the one before."""
        begun = time.monotonic()
        with Execs(kubectl, self.edges) as execs:
            for host in self.gateways.hosts.values():
                self.gateways.restart(host)
                self.gateways.wait_for_links()
        took, failed = time.monotonic() - begun, execs.failed()
        after = [f"{done.begun - begun:.1f}" for done in failed[:10]]
        check(not failed, f"{len(failed)} of {len(execs.done)} exec failed, begun after {', '.join(after)} s; the first: "
                          f"{failed and failed[0].failure}")
        check(len(execs.done) >= 20, f"only {len(execs.done)} exec in {took:.0f} s")
        return f"{len(execs.done)} exec in {took:.0f} s, none failed"

    def logs_outlive_other_gateways(self, kubectl):
        """Whichever gateways carry it are left alone; the others are restarted under it."""
        # A new kube-apiserver has no connection yet on which it could put the log.
        self.cluster.restart_apiserver()
        until("nothing goes through the gateways", 20, lambda: not self.gateways.carriers())
        with kubectl.follow("logs", "-f", "--tail=0", "on-edge-a") as running:
            running.line(10)
            carriers = self.gateways.carriers()
            others = [name for name in self.gateways.hosts if name not in carriers]
            check(carriers and others, f"the log is carried by {carriers or 'nobody'}: there is nothing to restart")
            worst = 0
            for name in others:
                restarting = threading.Thread(target=self.gateways.restart, args=(self.gateways.hosts[name],))
                restarting.start()
                while restarting.is_alive():
                    worst = max(worst, lateness(running.line(5)))
                restarting.join()
            check(worst < 2, f"a line was late by {worst:.1f} s")
        self.gateways.wait_for_links()
        return f"carried by {', '.join(sorted(carriers))}; {', '.join(others)} restarted; worst line {worst * 1000:.0f} ms"


def seconds_of(duration):
    """Of one such as `1m 30s`."""
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([a-z]+)", duration))


def lateness(line):
    """How late a line of the clock has come."""
    return uptime() - float(line.split()[1])
