"""The systems that are compared: how each is started, with the settings that its users would write.

A system is started anew for each measurement and ended behind it, so that none finds another's load, memory or warm
caches, and none lies idle beside the one that is measured. Used by __main__.py.

Hops are the TLS connections between client and target. What has two takes the client by TLS too; of what has one, the
client's part of the way is a Unix socket, or plain TCP where the system has no other door.
"""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from certificates import CLIENT, NODE, PASSWORD, Certificates
from netlab.lab import Failed, Host, Program
from networks import Place
from peers import Peer

# Until a system carries its first bytes, in seconds; and until a program of it has to be gone that was told to end.
READY, GONE = 40, 5


class Broken(Exception):
    """A system that does not do what it was asked for, and why."""


@dataclasses.dataclass(frozen=True)
class System:
    """One line of the tables."""

    name: str
    hops: int
    about: str
    start: Callable[["Stage"], list[str]]
    """Starts its programs and gives the driver's words for the way through it."""
    peer: str = ""
    """Of `peers.SOURCES`, if it is built from there."""


@dataclasses.dataclass
class Kit:
    """What systems are started with."""

    folder: Path
    binaries: Path
    other: Path | None
    peers: Mapping[str, Peer]
    certificates: Certificates

    @property
    def compare(self) -> Path:
        return self.binaries / "tunnel-compare"


class Stage:
    """A system while it runs, with its target, on the hosts of a place."""

    def __init__(self, kit: Kit, place: Place, system: System) -> None:
        self.kit, self.place, self.system = kit, place, system
        self.certificates = kit.certificates
        self.folder = kit.folder / "stage"
        self.programs: dict[str, Program] = {}
        self.via: list[str] = []
        self.target: Program
        self.target_port = place.port()

    @contextlib.contextmanager
    def running(self) -> Iterator["Stage"]:
        """From the moment when the first bytes have come through, until all its programs are gone."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        try:
            argv = [self.kit.compare, "target", "--listen", f"127.0.0.1:{self.target_port}"]
            self.target = self.place.edge.start(argv, log=self.folder / "target.log")
            self.via = self.system.start(self)
            self._wait()
            yield self
        finally:
            self._end()

    def drive(self, workload: str, *words: object) -> list[str]:
        """The driver's command."""
        return [str(word) for word in (self.kit.compare, "drive", workload, *words, *self.via)]

    def dead(self) -> str:
        """Which of the programs have ended, with what they said last; nothing if none has."""
        parts = {**self.programs, "target": self.target}
        ended = [f"{name} has ended: {last_words(part)}" for name, part in parts.items() if not part.alive()]
        return "; ".join(ended)

    def _wait(self) -> None:
        deadline = time.monotonic() + READY
        argv = self.drive("first-byte", "--seconds", 0.05, "--warm-up", 0, "--limit", 5)
        while True:
            if dead := self.dead():
                raise Broken(dead)
            try:
                self.place.cloud.run(argv, seconds=15)
                return
            except Failed as failure:
                why = str(failure).rpartition("tunnel-compare: ")[2]
            if time.monotonic() > deadline:
                parts = "; ".join(f"{name}: {last_words(part)}" for name, part in self.programs.items())
                raise Broken(f"nothing came through it within {READY} s: {why} ({parts})")
            time.sleep(0.1)

    def _end(self) -> None:
        everything = [*self.programs.values(), *([self.target] if hasattr(self, "target") else [])]
        for program in everything:
            with contextlib.suppress(ProcessLookupError):
                program.kill()

    # What `start` of a system is written with. What is near is started first: the tables name them in that order.

    def near(self, name: str, *argv: object) -> None:
        self._start(name, self.place.cloud, argv)

    def far(self, name: str, *argv: object) -> None:
        self._start(name, self.place.edge, argv)

    def _start(self, name: str, host: Host, argv: tuple[object, ...]) -> None:
        self.programs[name] = host.start(argv, log=self.folder / f"{name}.log", cwd=self.folder)

    def file(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def peer(self, program: str) -> Path:
        return self.kit.peers[self.system.peer].program(program)

    def tls(self) -> list[str]:
        """What the driver shows to a system that it speaks TLS with, and whom it expects there."""
        client = self.certificates.client
        return ["--ca", self.certificates.ca, "--cert", client.cert, "--key", client.key, "--server-name", "gateway"]


def last_words(program: Program) -> str:
    """What it logged last, on one line."""
    lines = [line.strip() for line in program.text().splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-400:] or "it says nothing"


# edge-tunnel: the settings of deploy/examples, but for the addresses, and with room for all streams of one caller to one
# port. YAML, of which JSON is a part.

def edge_tunnel(stage: Stage, other: bool, socket: bool) -> list[str]:
    place, certificates = stage.place, stage.certificates
    binaries = stage.kit.other if other else stage.kit.binaries
    gateway, node, ca = certificates.gateway, certificates.node, str(certificates.ca)
    edges, ingress = place.port(), place.port()
    own = {"cert": str(gateway.cert), "key": str(gateway.key), "client_ca": ca}
    unix = stage.folder / "ingress.sock"
    # An older build need not know of it, and had no such limit.
    callers = {} if other else {"max_streams_per_caller": "none"}
    settings = {
        "gateway_id": "gateway-1",
        "edges": {"listen": f"{place.gateway_address}:{edges}", **own},
        "ingress": {"listen": f"127.0.0.1:{ingress}", **own, "allowed_clients": [CLIENT], "unix": str(unix),
                    **callers},
        "link": {"max_streams": 2048},
        "admin": {"listen": f"127.0.0.1:{place.port()}"},
    }
    stage.near("tunnel-server", binaries / "tunnel-server", "run", "--config",
               stage.file("gateway.yaml", json.dumps(settings, indent=1)))
    settings = {
        "node": NODE, "gateways": [f"{place.gateway_address}:{edges}"], "proxy": "none",
        "tls": {"cert": str(node.cert), "key": str(node.key), "ca": ca},
        "kubelet": {"port": stage.target_port}, "allow": [f"node:{stage.target_port}"],
        "link": {"max_streams": 2048},
        "admin": {"listen": f"127.0.0.1:{place.port()}"},
    }
    stage.far("tunnel-edge", binaries / "tunnel-edge", "run", "--config",
              stage.file("edge.yaml", json.dumps(settings, indent=1)))
    target = ["--target", f"{NODE}:{stage.target_port}"]
    if socket:
        return ["--via", f"connect-uds:{unix}", *target]
    return ["--via", f"connect-tls:127.0.0.1:{ingress}", *target, *stage.tls()]


# The limit: the same TLS, and nothing else.

def relay(stage: Stage, hops: int) -> list[str]:
    place, ca = stage.place, stage.certificates.ca
    gateway, far = stage.certificates.gateway, stage.certificates.far
    near_port, far_port, socket = place.port(), place.port(), stage.folder / "relay.sock"
    door = ["--listen", f"127.0.0.1:{near_port}", "--accept-tls", f"{gateway.cert},{gateway.key},{ca}"]
    stage.near("relay-near", stage.kit.compare, "relay", *(door if hops == 2 else ["--listen", f"unix:{socket}"]),
               "--to", f"{place.edge_address}:{far_port}", "--dial-tls", f"{gateway.cert},{gateway.key},{ca},far")
    stage.far("relay-far", stage.kit.compare, "relay", "--listen", f"{place.edge_address}:{far_port}",
              "--to", f"127.0.0.1:{stage.target_port}", "--accept-tls", f"{far.cert},{far.key},{ca}")
    if hops == 1:
        return ["--via", f"uds:{socket}"]
    return ["--via", f"tls:127.0.0.1:{near_port}", *stage.tls()]


def haproxy(stage: Stage, hops: int) -> list[str]:
    place, ca = stage.place, stage.certificates.ca
    gateway, far = stage.certificates.gateway, stage.certificates.far
    near_port, far_port, socket = place.port(), place.port(), stage.folder / "haproxy.sock"
    # The cipher is that of relay and driver; all else is what a person would write.
    common = """
global
  maxconn 8000
  ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
  ssl-default-server-ciphersuites TLS_AES_128_GCM_SHA256
  ssl-default-bind-options ssl-min-ver TLSv1.3
  ssl-default-server-options ssl-min-ver TLSv1.3
defaults
  mode tcp
  timeout connect 5s
  timeout client 5m
  timeout server 5m
"""
    tls = f"ssl crt {gateway.both} ca-file {ca} verify required"
    bind = f"127.0.0.1:{near_port} {tls}" if hops == 2 else f"unix@{socket}"
    stage.near("haproxy-near", "haproxy", "-db", "-f", stage.file("near.cfg", f"""{common}
listen near
  bind {bind}
  server far {place.edge_address}:{far_port} {tls} verifyhost far
"""))
    stage.far("haproxy-far", "haproxy", "-db", "-f", stage.file("far.cfg", f"""{common}
listen far
  bind {place.edge_address}:{far_port} ssl crt {far.both} ca-file {ca} verify required
  server target 127.0.0.1:{stage.target_port}
"""))
    if hops == 1:
        return ["--via", f"uds:{socket}"]
    return ["--via", f"tls:127.0.0.1:{near_port}", *stage.tls()]


# The peers.

def konnectivity(stage: Stage, front: str) -> list[str]:
    """As docs of Kubernetes set it up, but without its log of each packet (`-v 0`), which would be what is measured."""
    place, ca = stage.place, stage.certificates.ca
    gateway, node = stage.certificates.gateway, stage.certificates.node
    agents, ingress, socket = place.port(), place.port(), stage.folder / "konnectivity.sock"
    if front == "connect-tls":
        door = ["--mode=http-connect", "--server-bind-address=127.0.0.1", f"--server-port={ingress}",
                f"--server-ca-cert={ca}", f"--server-cert={gateway.cert}", f"--server-key={gateway.key}"]
        way, own = f"connect-tls:127.0.0.1:{ingress}", stage.tls()
    else:
        mode = "grpc" if front == "grpc-uds" else "http-connect"
        door = [f"--mode={mode}", "--server-port=0", f"--uds-name={socket}"]
        way, own = f"{front}:{socket}", []
    stage.near("konnectivity-server", stage.peer("server"), "-v=0", *door,
               f"--agent-bind-address={place.gateway_address}", f"--agent-port={agents}", f"--cluster-ca-cert={ca}",
               f"--cluster-cert={gateway.cert}", f"--cluster-key={gateway.key}", f"--admin-port={place.port()}",
               f"--health-port={place.port()}")
    stage.far("konnectivity-agent", stage.peer("agent"), "-v=0", f"--proxy-server-host={place.gateway_address}",
              f"--proxy-server-port={agents}", f"--ca-cert={ca}", f"--agent-cert={node.cert}",
              f"--agent-key={node.key}", f"--admin-server-port={place.port()}", f"--health-server-port={place.port()}")
    return ["--via", way, "--target", f"127.0.0.1:{stage.target_port}", *own]


def frp(stage: Stage) -> list[str]:
    place, ca = stage.place, stage.certificates.ca
    gateway, node = stage.certificates.gateway, stage.certificates.node
    server, port = place.port(), place.port()
    stage.near("frps", stage.peer("frps"), "-c", stage.file("frps.toml", f"""
bindAddr = "{place.gateway_address}"
bindPort = {server}
proxyBindAddr = "127.0.0.1"
log.level = "warn"
transport.tls.force = true
transport.tls.certFile = "{gateway.cert}"
transport.tls.keyFile = "{gateway.key}"
transport.tls.trustedCaFile = "{ca}"
"""))
    stage.far("frpc", stage.peer("frpc"), "-c", stage.file("frpc.toml", f"""
serverAddr = "{place.gateway_address}"
serverPort = {server}
loginFailExit = false
log.level = "warn"
transport.tls.enable = true
transport.tls.certFile = "{node.cert}"
transport.tls.keyFile = "{node.key}"
transport.tls.trustedCaFile = "{ca}"
transport.tls.serverName = "gateway"

[[proxies]]
name = "target"
type = "tcp"
localIP = "127.0.0.1"
localPort = {stage.target_port}
remotePort = {port}
"""))
    return ["--via", f"tcp:127.0.0.1:{port}"]


def chisel(stage: Stage) -> list[str]:
    place, ca = stage.place, stage.certificates.ca
    gateway, node = stage.certificates.gateway, stage.certificates.node
    server, port = place.port(), place.port()
    stage.near("chisel-server", stage.peer("chisel"), "server", "--reverse", "--host", place.gateway_address,
               "--port", server, "--tls-cert", gateway.cert, "--tls-key", gateway.key, "--tls-ca", ca)
    stage.far("chisel-client", stage.peer("chisel"), "client", "--max-retry-interval", "1s", "--tls-ca", ca,
              "--tls-cert", node.cert, "--tls-key", node.key, f"https://{place.gateway_address}:{server}",
              f"R:127.0.0.1:{port}:127.0.0.1:{stage.target_port}")
    return ["--via", f"tcp:127.0.0.1:{port}"]


def rathole(stage: Stage) -> list[str]:
    place, gateway = stage.place, stage.certificates.gateway
    server, port = place.port(), place.port()
    stage.near("rathole-server", stage.peer("rathole"), "--server", stage.file("server.toml", f"""
[server]
bind_addr = "{place.gateway_address}:{server}"
default_token = "compare"
[server.transport]
type = "tls"
[server.transport.tls]
pkcs12 = "{gateway.pkcs12}"
pkcs12_password = "{PASSWORD}"
[server.services.target]
bind_addr = "127.0.0.1:{port}"
"""))
    stage.far("rathole-client", stage.peer("rathole"), "--client", stage.file("client.toml", f"""
[client]
remote_addr = "{place.gateway_address}:{server}"
default_token = "compare"
[client.transport]
type = "tls"
[client.transport.tls]
trusted_root = "{stage.certificates.ca}"
hostname = "gateway"
[client.services.target]
local_addr = "127.0.0.1:{stage.target_port}"
"""))
    return ["--via", f"tcp:127.0.0.1:{port}"]


# TLS 1.3 and AES-128-GCM, as the driver and the relay offer alone, haproxy is told, and Go and edge-tunnel prefer; but
# rathole's native-tls settles for TLS 1.2 and ChaCha20-Poly1305.
SYSTEMS = {system.name: system for system in (
    System("edge-tunnel", 2, "gateway and edge, CONNECT over mTLS", lambda stage: edge_tunnel(stage, False, False)),
    System("edge-tunnel-uds", 1, "the same, CONNECT over a Unix socket", lambda stage: edge_tunnel(stage, False, True)),
    System("other", 2, "another build of edge-tunnel, mTLS", lambda stage: edge_tunnel(stage, True, False)),
    System("other-uds", 1, "another build of edge-tunnel, Unix socket", lambda stage: edge_tunnel(stage, True, True)),
    System("relay", 2, "the limit: two plain tokio-rustls relays, mTLS", lambda stage: relay(stage, 2)),
    System("relay-1", 1, "the limit: the same, the client by a Unix socket", lambda stage: relay(stage, 1)),
    System("haproxy", 2, "two of them, mTLS", lambda stage: haproxy(stage, 2)),
    System("haproxy-1", 1, "the same, the client by a Unix socket", lambda stage: haproxy(stage, 1)),
    System("konnectivity", 2, "HTTP CONNECT over mTLS",
           lambda stage: konnectivity(stage, "connect-tls"), "konnectivity"),
    System("konnectivity-uds", 1, "HTTP CONNECT over a Unix socket",
           lambda stage: konnectivity(stage, "connect-uds"), "konnectivity"),
    System("konnectivity-grpc", 1, "gRPC over a Unix socket", lambda stage: konnectivity(stage, "grpc-uds"),
           "konnectivity"),
    System("frp", 1, "a TCP port, mTLS, its tcpMux", frp, "frp"),
    System("chisel", 1, "a TCP port, mTLS, and SSH within it", chisel, "chisel"),
    System("rathole", 1, "a TCP port, TLS 1.2 by native-tls (OpenSSL), only the server shows a certificate",
           rathole, "rathole"),
)}
