"""What is tested: gateways, etcd, edges with their targets, and haproxy before both sides, each on a host of its own.

                      wan
    client  balancer   |    site-1 (NAT) --- edge-1, 192.168.1.10
          \\     |      |   /
           +----+------+--+-- site-2 (NAT) --- edge-2, 192.168.1.10 ...
                |      |
    gw-a ... gw-d      etcd-0 ... etcd-2

Edges and the client know the balancer's address only; gw-d is there for the case in which a gateway joins. All nodes
have the same private address, so that nothing but the tunnel can tell them apart. Used by cases.py and chaos.py.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from netlab.lab import Failed, Host, Lab, Link, Program, until
from traffic import PORT

GATEWAYS = ("gw-a", "gw-b", "gw-c")
# Of the peers' list and of haproxy from the beginning, but not started.
FOURTH = "gw-d"
EDGES = tuple(f"edge-{number}" for number in range(1, 7))
MEMBERS = ("etcd-0", "etcd-1", "etcd-2")
PRIVATE = "192.168.1.10"
# Where the edges' gateways are at addresses of their own, if they can be reached there.
ADDRESSES = ("reachable", "unreachable", "unset")
INGRESS, ADMIN, CLOSED = 8131, 8132, 18443
# What haproxy needs to notice that a gateway leaves, and some more: two checks, 250 ms apart, and a busy machine.
DRAIN_DELAY, DRAIN_TIMEOUT = 3, 6
LINK_HEARTBEAT, PEER_HEARTBEAT = 2, 1
LEASE = 5
REBALANCE = 5


class Part:
    """A program on its host, which is started and ended many times."""

    def __init__(self, host: Host, name: str, argv: Sequence[object], log: Path) -> None:
        self.host, self.name, self.argv, self.log = host, name, argv, log
        self.program: Program | None = None

    def start(self) -> None:
        if self.alive():
            raise Failed(f"{self.name} runs already")
        self.program = self.host.start(self.argv, log=self.log)

    def alive(self) -> bool:
        return self.program is not None and self.program.alive()

    def kill(self) -> None:
        if self.program:
            self.program.kill()

    def send(self, number: int) -> None:
        if self.program:
            self.program.send(number)

    def stop(self, seconds: float = 30) -> None:
        """In order: an exit code other than 0 is an error."""
        if self.program and (code := self.program.stop(seconds=seconds)) != 0:
            raise Failed(f"{self.name} has ended with {code}: {self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-600:]


class Daemon(Part):
    """One of ours, with an admin listener."""

    def __init__(self, host: Host, name: str, argv: Sequence[object], log: Path, admin: int) -> None:
        super().__init__(host, name, argv, log)
        self.admin = admin

    def ready(self) -> bool:
        return "ok" in self._ask("readyz", check=False)

    def answers(self) -> bool:
        return "ok" in self._ask("healthz", check=False)

    def metrics(self) -> dict[str, float]:
        """All samples, by name with labels."""
        found = {}
        for line in self._ask("metrics").splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
        return found

    def metric(self, name: str, label: str = "") -> float:
        """The sum over all labels, or over those with this text in them."""
        return total(self.metrics(), name, label)

    def _ask(self, path: str, check: bool = True) -> str:
        url = f"http://127.0.0.1:{self.admin}/{path}"
        fail = ["--fail"] if check else []
        return self.host.run(["curl", "-sS", *fail, "--max-time", "3", url], check=check).stdout


def total(metrics: dict[str, float], name: str, label: str = "") -> float:
    return sum(value for key, value in metrics.items() if key.split("{")[0] == name and label in key)


class Cluster:
    """All hosts, for the whole run; the programs on them, anew for each directory."""

    def __init__(self, lab: Lab, folder: Path, binaries: Path) -> None:
        self.lab, self.folder = lab, folder
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        # Copies: who builds while this runs must not mix two versions.
        self.server, self.edge = (
            shutil.copy(binaries / name, folder / name) for name in ("tunnel-server", "tunnel-edge"))
        self.wan = lab.router("wan")
        names = ("client", "balancer", *GATEWAYS, FOURTH, *MEMBERS)
        self.hosts = {name: lab.host(name) for name in names}
        self.access: dict[str, Link] = {name: lab.link(self.hosts[name], self.wan) for name in names}
        for number, name in enumerate(EDGES):
            self._site(name, number)
        # For nodes that are new: behind one more router.
        self._site("nursery", len(EDGES))
        for name in EDGES:
            self._target(name, self.hosts[name], PRIVATE)
        self.fresh: dict[str, tuple[Part, str]] = {}
        self.pki, self.etcd_pki = folder / "pki", folder / "etcd-pki"
        self._certificates()
        self.directory, self.addresses = "", ""
        self.gateways: dict[str, Daemon] = {}
        self.edges: dict[str, Daemon] = {}
        self.etcd: dict[str, Part] = {}
        self.haproxy = self._haproxy()

    def _site(self, name: str, number: int) -> None:
        router, host = self.lab.router(f"site-{number + 1}", nat=True), self.lab.host(name)
        self.access[name] = self.lab.link(router, self.wan, delay=2 + 2 * number)
        self.lab.link(host, router)
        host.sh(f"ip address add {PRIVATE}/32 dev lo")
        self.hosts[name] = host

    def _target(self, node: str, host: Host, address: str) -> Part:
        program = Path(__file__).with_name("traffic.py")
        argv = [sys.executable, "-B", program, "target", node, address, PORT]
        target = Part(host, f"target of {node}", argv, self.logs / f"{node}-target.log")
        target.start()
        return target

    # Credentials and settings.

    def _certificates(self) -> None:
        """All by our own command; etcd's too, whose members are peers of one another."""
        self._pki("init", self.pki, "--dns", "balancer", "--client", "control-plane")
        self._pki("init", self.etcd_pki)
        for name in (*GATEWAYS, FOURTH):
            for domain in ("edge", "control-plane"):
                self._pki("issue", "gateway", name, "--domain", domain, "--dns", "balancer", "--dns", name,
                          "--dir", self.pki)
            self._pki("issue", "peer", name, "--dns", name, "--dir", self.pki)
        for name in EDGES:
            self._pki("issue", "edge", name, "--dir", self.pki)
        for name in MEMBERS:
            self._pki("issue", "peer", name, "--dns", name, "--dns", "localhost", "--ip", self.hosts[name].address,
                      "--ip", "127.0.0.1", "--dir", self.etcd_pki)
        self._pki("issue", "peer", "client", "--dir", self.etcd_pki)

    def _pki(self, *words: object) -> None:
        done = subprocess.run([self.server, "pki", *map(str, words)], capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"tunnel-server pki {' '.join(map(str, words))}: {done.stderr.strip()}")

    def _settings(self, name: str, settings: dict[str, object]) -> Path:
        """YAML, of which JSON is a part."""
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(settings, indent=1))
        return path

    def _gateway(self, name: str) -> Daemon:
        host, pki = self.hosts[name], self.pki

        def files(domain: str, ca: str) -> dict[str, str]:
            own = f"{pki}/{domain}/{name}"
            return {"cert": f"{own}.crt", "key": f"{own}.key", ca: f"{pki}/{domain}/ca.crt"}
        edges = {"listen": "0.0.0.0:8443", **files("edge", "client_ca")}
        if self.addresses != "unset":
            edges["address"] = f"{name}:{8443 if self.addresses == 'reachable' else CLOSED}"
        settings: dict[str, object] = {
            "gateway_id": name,
            "edges": edges,
            "ingress": {"listen": f"0.0.0.0:{INGRESS}", **files("control-plane", "client_ca")},
            "link": {"heartbeat": f"{LINK_HEARTBEAT}s"},
            "admin": {"listen": f"0.0.0.0:{ADMIN}"},
            "drain": {"delay": f"{DRAIN_DELAY}s", "timeout": f"{DRAIN_TIMEOUT}s"},
        }
        peers: dict[str, object] = {"listen": "0.0.0.0:8444", "heartbeat": f"{PEER_HEARTBEAT}s", **files("peer", "ca")}
        if self.directory == "peers":
            peers["gateways"] = [f"{other}:8444" for other in (*GATEWAYS, FOURTH)]
        else:
            peers["address"] = f"{name}:8444"
            settings["etcd"] = {"endpoints": [f"https://{member}:2379" for member in MEMBERS], "lease": f"{LEASE}s",
                                **self._etcd_files("client", "ca", "cert", "key")}
        settings["peers"] = peers
        argv = [self.server, "run", "--config", self._settings(name, settings)]
        return Daemon(host, name, argv, self.logs / f"{self.directory}-{name}.log", ADMIN)

    def new_edge(self, name: str, host: Host, address: str, admin: int = 8133, **settings: object) -> Daemon:
        """The agent of a node whose certificate is there already."""
        pki = self.pki / "edge"
        path = self._settings(name, {
            "node": name, "gateways": ["balancer:8443"], "redundancy": 2, "rebalance": f"{REBALANCE}s", "proxy": "none",
            "connect_timeout": "5s", "admin": {"listen": f"127.0.0.1:{admin}"},
            "tls": {"cert": f"{pki}/{name}.crt", "key": f"{pki}/{name}.key", "ca": f"{pki}/ca.crt"},
            "kubelet": {"address": address, "port": PORT}, **settings})
        argv = [self.edge, "run", "--config", path]
        return Daemon(host, name, argv, self.logs / f"{self.directory}-{name}.log", admin)

    def _etcd_files(self, name: str, ca: str, cert: str, key: str) -> dict[str, str]:
        pki = self.etcd_pki / "peer"
        return {ca: f"{pki}/ca.crt", cert: f"{pki}/{name}.crt", key: f"{pki}/{name}.key"}

    def _member(self, name: str) -> Part:
        host = self.hosts[name]
        own, peer = f"https://{host.address}:2379", f"https://{host.address}:2380"
        options = {
            "name": name, "data-dir": f"/run/{name}", "listen-client-urls": f"{own},https://127.0.0.1:2379",
            "advertise-client-urls": own, "listen-peer-urls": peer, "initial-advertise-peer-urls": peer,
            "initial-cluster": ",".join(f"{other}=https://{self.hosts[other].address}:2380" for other in MEMBERS),
            "client-cert-auth": "true", **self._etcd_files(name, "trusted-ca-file", "cert-file", "key-file"),
            "peer-client-cert-auth": "true",
            **self._etcd_files(name, "peer-trusted-ca-file", "peer-cert-file", "peer-key-file")}
        argv = ["etcd", *(f"--{option}={value}" for option, value in options.items())]
        return Part(host, name, argv, self.logs / f"{name}.log")

    def _haproxy(self) -> Part:
        def side(name: str, port: int) -> Iterable[str]:
            yield f"listen {name}\n  bind :{port}\n  option httpchk GET /readyz"
            for gateway in (*GATEWAYS, FOURTH):
                yield f"  server {gateway} {self.hosts[gateway].address}:{port}"
        path = self.folder / "haproxy.cfg"
        # What a person would write; that a connection which is refused goes elsewhere is haproxy's part of the promise.
        path.write_text("\n".join([f"""
global
  maxconn 8000
  log stdout format raw local0 notice
  stats socket {self.folder}/haproxy.sock
defaults
  mode tcp
  log global
  balance roundrobin
  retries 3
  option redispatch 1
  option log-health-checks
  timeout connect 1s
  timeout check 1s
  timeout client 2m
  timeout server 2m
  default-server check port {ADMIN} inter 250ms fall 2 rise 1
""", *side("edges", 8443), *side("ingress", INGRESS), ""]))
        return Part(self.hosts["balancer"], "haproxy", ["haproxy", "-db", "-f", path], self.logs / "haproxy.log")

    # Its life.

    def start(self, directory: str, addresses: str) -> None:
        self.directory, self.addresses = directory, addresses
        for name in (*GATEWAYS, FOURTH):
            # As a firewall does: no answer.
            self.hosts[name].sh(f"iptables -C INPUT -p tcp --dport {CLOSED} -j DROP 2> /dev/null || "
                                f"iptables -A INPUT -p tcp --dport {CLOSED} -j DROP")
        self.gateways = {name: self._gateway(name) for name in (*GATEWAYS, FOURTH)}
        self.edges = {name: self.new_edge(name, self.hosts[name], PRIVATE) for name in EDGES}
        if directory == "etcd":
            self.etcd = {name: self._member(name) for name in MEMBERS}
            for member in self.etcd.values():
                member.start()
            self.wait_for_etcd()
        if not self.haproxy.alive():
            self.haproxy.start()
        for name in GATEWAYS:
            self.gateways[name].start()
        for name in GATEWAYS:
            self.wait_ready(name)
        for edge in self.edges.values():
            edge.start()
        self.wait_for_links(40)

    def stop(self) -> None:
        for part in (*self.edges.values(), *self.gateways.values(), *self.etcd.values()):
            part.kill()
        self.etcd = {}

    def wait_ready(self, name: str, seconds: float = 20) -> None:
        gateway = self.gateways[name]

        def ready() -> bool:
            return not gateway.alive() or gateway.ready()
        until(f"{name} is ready", seconds, ready)
        if not gateway.alive():
            raise Failed(f"{name} has ended: {gateway.tail()}")

    def wait_for_links(self, seconds: float = 30) -> None:
        until("every edge has its two links", seconds, self.settled, 0.3)

    def settled(self) -> bool:
        def has_both(edge: Daemon) -> bool:
            metrics = edge.metrics()
            return metrics["tunnel_edge_gateways_linked"] == metrics["tunnel_edge_links_wanted"] == 2
        return all(has_both(edge) for edge in self.edges.values())

    def running(self) -> list[str]:
        return [name for name, gateway in self.gateways.items() if gateway.alive()]

    def over_gateways(self, metric: str, label: str = "") -> float:
        return sum(self.gateways[name].metric(metric, label) for name in self.running())

    def etcdctl(self, *words: str) -> str:
        files = self._etcd_files("client", "cacert", "cert", "key")
        argv = ["etcdctl", f"--endpoints={','.join(f'https://{member}:2379' for member in MEMBERS)}",
                "--command-timeout=2s", *(f"--{option}={value}" for option, value in files.items()), *words]
        return self.hosts["client"].run(argv, env={"ETCDCTL_API": "3"}).stdout

    def wait_for_etcd(self) -> None:
        until("etcd can be written", 30, lambda: self.etcdctl("put", "rig", "here"))

    def keys(self) -> tuple[set[str], set[tuple[str, str]]]:
        """What is in etcd: the gateways, and who holds which node."""
        words = [key.split("/")[2:] for key in self.etcdctl("get", "--prefix", "--keys-only", "/edge-tunnel/").split()]
        gateways = {key[1] for key in words if key[0] == "gateways"}
        return gateways, {(key[1], key[2]) for key in words if key[0] == "nodes"}

    def newcomers(self, count: int, prefix: str) -> list[Daemon]:
        """Nodes that were never seen before, each with a target, all on one host behind one router. Not started."""
        host, found = self.hosts["nursery"], []
        for number in range(1, count + 1):
            name, address = f"{prefix}-{number}", f"192.168.2.{number}"
            self._pki("issue", "edge", name, "--dir", self.pki)
            host.sh(f"ip address add {address}/32 dev lo")
            self.fresh[name] = self._target(name, host, address), address
            found.append(self.new_edge(name, host, address, 9000 + number, redundancy=1))
        return found

    def forget(self, newcomers: Iterable[Daemon]) -> None:
        for edge in newcomers:
            edge.kill()
            target, address = self.fresh.pop(edge.name)
            target.kill()
            edge.host.sh(f"ip address delete {address}/32 dev lo")

    def cut_short(self, since: float) -> list[tuple[float, str, str]]:
        """When a target saw a clean end where the client had made none: (when, node, line)."""
        found = []
        for log in self.logs.glob("*-target.log"):
            for line in log.read_text(errors="replace").splitlines():
                when, _, what = line.partition(" ")
                if what.startswith(("SHORT", "STRANGE")) and float(when) >= since:
                    found.append((float(when), log.name.removesuffix("-target.log"), line))
        return found
