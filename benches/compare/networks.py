"""Where it is measured: this machine alone, or two hosts of the network lab with a link between them.

In all of them, `cloud` has the gateway's side and what drives the load, `edge` the edge's side and the target. Only the
tunnel's own way is between the two. Used by __main__.py and systems.py.
"""

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from netlab.lab import Host, Lab, Link

# Of the kernel's, which end at 4 MiB: with them, no single connection fills 1 Gbit/s over 50 ms, whoever sends.
BUFFERS = "4096 131072 33554432"
# What a host's own listeners use; what it connects from is above.
PORTS = range(2000, 9000)


@dataclasses.dataclass(frozen=True)
class Network:
    """A kind of network, by the words of `Lab.link`; without any, there is one host, and its loopback."""

    name: str
    title: str
    link: dict[str, float] = dataclasses.field(default_factory=dict)
    rtt: float = 0
    """Milliseconds."""
    outage: tuple[float, float] | None = None
    """Every so many seconds, and for how long, nothing passes."""
    least: float = 0
    """Shorter than so many seconds, a measurement says nothing there."""
    warm_up: float = 0.5
    """Seconds before each measurement: windows have to grow."""
    limit: float = 30
    """Seconds that opening streams and emptying buffers may take beside that."""
    congestion: str = "cubic"
    """How TCP sends. Pinned: it decides more than any system does, and machines differ in it."""


LOSSY = Network("lossy", "1 Gbit/s, 50 ms, 1 % loss each way", dict(rate=1000, delay=25, loss=1), rtt=50, least=5,
                warm_up=2, limit=90)
NETWORKS = {network.name: network for network in (
    Network("loopback", "loopback"),
    Network("wan", "1 Gbit/s, 50 ms", dict(rate=1000, delay=25), rtt=50, least=5, warm_up=2, limit=90),
    LOSSY,
    dataclasses.replace(LOSSY, name="lossy-bbr", title=f"{LOSSY.title}, BBR", congestion="bbr"),
    Network("mobile", "4G-like: 50 Mbit/s, 60 ms, jitter 20 ms, out for 2 of 8 s",
            dict(rate=50, delay=30, jitter=20), rtt=60, outage=(8, 2),
            least=16, limit=90),
)}
GROUPS = {"all": tuple(NETWORKS), "lab": tuple(name for name, network in NETWORKS.items() if network.link)}


class Place:
    """The hosts of one network, for all that is measured on it."""

    def __init__(self, lab: Lab, network: Network) -> None:
        self.network = network
        self._ports = itertools.cycle(PORTS)
        self._link: Link | None = None
        if network.link:
            self.cloud, self.edge = (lab.host(f"{network.name}-{side}") for side in ("cloud", "edge"))
            self._link = lab.link(self.edge, self.cloud, **network.link)
            self.gateway_address, self.edge_address = self.cloud.address, self.edge.address
        else:
            self.cloud = self.edge = lab.host(network.name)
            self.gateway_address = self.edge_address = "127.0.0.1"
            # The lab's rules, which are for links.
            self.cloud.sh("iptables -F; iptables -t mangle -F")
        for host in {self.cloud, self.edge}:
            self._settle(host)

    def _settle(self, host: Host) -> None:
        host.sh(f"cd /proc/sys/net/ipv4; echo {PORTS.stop} 65535 > ip_local_port_range; "
                f"echo {BUFFERS} > tcp_wmem; echo {BUFFERS} > tcp_rmem; "
                f"echo {self.network.congestion} > tcp_congestion_control")

    def port(self) -> int:
        """For a listener: the hosts are this run's own, so all are free, and none is used twice in a row."""
        return next(self._ports)

    @contextlib.contextmanager
    def weather(self) -> Iterator[None]:
        """For the length of one measurement: the network's outages, at the same moments of each."""
        if not self.network.outage or not self._link:
            yield
            return
        done = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            outages = pool.submit(self._outages, done, *self.network.outage)
            try:
                yield
            finally:
                done.set()
            # Figures without them would be another network's.
            outages.result()

    def _outages(self, done: threading.Event, every: float, seconds: float) -> None:
        while not done.wait(every - seconds):
            self._link.set(loss=100)
            done.wait(seconds)
            self._link.set(loss=self.network.link.get("loss", 0))
