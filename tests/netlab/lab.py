"""Hosts on one machine, and links between them with a rate, delay, jitter and loss that are what was asked for.

For tests and measurements that need a network worse than loopback: `tests/cluster/run` and `benches/compare/run` import
this file, and `run --self-check` measures that it keeps its word. A program that uses it begins with `enter()`:

    sys.path.insert(0, str(checkout / "tests"))
    from netlab.lab import Lab, enter

    enter({"haproxy": "haproxy"})                    # the rest of this program runs in namespaces that end with it
    with Lab() as lab:
        wan, site = lab.router("wan"), lab.router("site", nat=True)
        cloud, edge = lab.host("cloud"), lab.host("edge")
        lab.link(cloud, wan, rate=1000)
        access = lab.link(site, wan, rate=50, delay=25, jitter=5, loss=1)
        lab.link(edge, site)
        server = cloud.start(["some-server", "--listen", f"{cloud.address}:443"], log=folder / "server.log")
        edge.run(["curl", "https://cloud/"])         # every host knows the others' names
        access.set(delay=200)                        # while traffic runs
        lab.partition(edge, cloud)
        lab.heal(edge, cloud)

Each thing is done where the kernel does it best, in the order of a real path: the rate by a token bucket where a
packet is sent; then, where it is received, loss by iptables, and delay and jitter by a program of ours (src/main.rs
says why that); then partitions, which so take what is in flight with them. Where the kernel has netem, that does delay,
jitter and rate. A round trip takes up to half a millisecond more than was asked for: a timer of a virtual machine is
late. What asks the kernel when a packet was received (ping without -U) does not see the delay of its own last link.
"""

import contextlib
import dataclasses
import ipaddress
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn, TypeVar

# Both ends of every link are from here.
NETWORK = ipaddress.ip_network("10.77.0.0/16")
# Where the wire is; that it is set says that there is no need to build it.
WIRE = "NETLAB_WIRE"
PACKAGES = {"ip": "iproute2", "tc": "iproute2", "iptables": "iptables", "nsenter": "util-linux",
            "unshare": "util-linux", "setpriv": "util-linux", "mount": "mount"}
# How long what is inside may take to end when it is told to.
GRACE = 10
# What a rate needs beside it: the burst is what passes in a millisecond, and two packets at least.
BURST, PACKET = 0.001, 1514

Address = ipaddress.IPv4Address
T = TypeVar("T")


class Failed(Exception):
    """A command that ended otherwise than it should."""


# Everything happens in namespaces of its own.

def enter(packages: Mapping[str, str] | None = None) -> None:
    """Runs the rest of this program inside PID, network and mount namespaces that end with it, however it ends.

    Called first of all. Installs what is missing of what the lab needs and of `packages`, Debian's package by the name
    of a program; builds the wire; starts this program again, inside, where `enter` returns. Outside it does not return,
    and a signal that comes there is SIGTERM inside: a `finally` has ten seconds.
    """
    if os.getpid() == 1 and WIRE in os.environ:
        _settle()
        return
    if os.geteuid() != 0:
        _refuse("must be root, for namespaces and their networks")
    _install({**PACKAGES, **(packages or {})})
    environment = {**os.environ, WIRE: os.environ.get(WIRE) or _build()}
    inside = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", "--kill-child", "--fork", "--pid", "--mount", "--net",
         "--mount-proc", sys.executable, *sys.orig_argv[1:]], env=environment)
    received: list[int] = []

    def end(number: int, _: object) -> None:
        received.append(number)
        with contextlib.suppress(OSError, IndexError):
            children = Path(f"/proc/{inside.pid}/task/{inside.pid}/children")
            os.kill(int(children.read_text().split()[0]), signal.SIGTERM)
        signal.signal(signal.SIGALRM, lambda *_: inside.kill())
        signal.alarm(GRACE)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    code = inside.wait()
    sys.exit(128 + received[0] if received else code if code >= 0 else 128 - code)


def _settle() -> None:
    """Inside: one signal that ends the program, whatever was pressed, and files of its own where that is needed."""
    def end(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    # From a terminal the interrupt comes here too, and once more as SIGTERM. Not ignored: that would be inherited.
    signal.signal(signal.SIGINT, lambda *_: None)
    _do("mount -t tmpfs tmpfs /run; mkdir -p /run/netns /run/lock; echo 127.0.0.1 localhost > /run/hosts; "
        "mount --bind /run/hosts /etc/hosts; ip link set lo up")


def _install(packages: Mapping[str, str]) -> None:
    missing = sorted({package for program, package in packages.items() if not shutil.which(program)})
    if missing:
        print(f"==> installing {' '.join(missing)}", flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *missing]):
            subprocess.run(["apt-get", *command], check=True, env=environment, stdout=subprocess.DEVNULL)


def _build() -> str:
    checkout = Path(__file__).resolve().parents[2]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = os.environ.get("CARGO_TARGET_DIR") or str(cache / "edge-tunnel" / "target")
    built = subprocess.run(["cargo", "build", "--quiet", "--release", "--locked", "-p", "tunnel-netlab"],
                           cwd=checkout, env={**os.environ, "CARGO_TARGET_DIR": target})
    if built.returncode != 0:
        _refuse("the wire, tunnel-netlab, could not be built: see above")
    return str(checkout / target / "release" / "tunnel-netlab")


def _refuse(why: str) -> NoReturn:
    sys.exit(f"{sys.argv[0]}: {why}")


def _do(script: str, stdin: str = "") -> None:
    done = subprocess.run(["sh", "-ec", script], input=stdin, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"{script}: exit code {done.returncode}: {done.stderr.strip()[-800:]}")


# What a lab is made of.

@dataclasses.dataclass(frozen=True)
class Conditions:
    """How one direction of a link is. None of it: as fast as the machine."""

    rate: float | None = None
    """Megabits a second."""
    delay: float = 0
    """Milliseconds, one way: 25 each way is a round trip of 50."""
    jitter: float = 0
    """Milliseconds, no more than the delay, which wanders that far to both sides. Packets keep their order."""
    loss: float = 0
    """Per cent of the packets, each by a lot of its own. 100 is a cut cable."""
    queue: float = 50
    """What waits for the rate at most, in milliseconds at that rate; the rest is lost."""

    def __post_init__(self) -> None:
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"a rate is megabits a second, or None for no bound, not {self.rate}")
        if not 0 <= self.jitter <= self.delay:
            raise ValueError(f"a jitter is between 0 and the delay, {self.delay} ms, not {self.jitter}")
        if not 0 <= self.loss <= 100:
            raise ValueError(f"loss is per cent, not {self.loss}")
        if self.queue <= 0:
            raise ValueError(f"a queue is milliseconds, more than 0, not {self.queue}")


class Program:
    """A program that was started on a host. It ends with the lab, if nothing has ended it before."""

    def __init__(self, host: "Host", argv: Sequence[str], process: subprocess.Popen, log: Path | None) -> None:
        self.host, self.argv, self.process, self.log = host, argv, process, log

    @property
    def pid(self) -> int:
        """Of the program itself, as the lab's processes number it."""
        return self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, number: int) -> None:
        """A signal, if it still runs. SIGSTOP and SIGCONT make a program that hangs for a while."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """With -9, and waits until it is gone."""
        self.process.kill()
        self.process.wait()

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Asks it to end, waits, and gives its exit code."""
        self.send(number)
        return self.wait(seconds)

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failed(f"on {self.host.name}, not done in {seconds} s: {shlex.join(self.argv)}") from None

    def text(self) -> str:
        """What it has logged."""
        return self.log.read_text(errors="replace") if self.log else ""


class Host:
    """A machine of the lab: a network of its own, and every file of the real one. Made by `Lab.host`."""

    def __init__(self, lab: "Lab", name: str, forwards: bool, nat: bool) -> None:
        self.lab, self.name, self.forwards, self.nat = lab, name, forwards, nat
        self.ends: list["End"] = []
        self.programs: list[Program] = []
        _do(f"ip netns add {name}; ip -n {name} link set lo up")
        self.sh(f"echo {int(forwards)} > /proc/sys/net/ipv4/ip_forward; iptables -t mangle -N cut; "
                "iptables -t mangle -A PREROUTING -j cut; iptables -N reset; "
                "iptables -A INPUT -j reset; iptables -A FORWARD -j reset")

    @property
    def address(self) -> str:
        """On its first link."""
        if not self.ends:
            raise ValueError(f"{self.name} has no address before it has a link")
        return str(self.ends[0].address)

    def argv(self, argv: Sequence[object]) -> list[str]:
        """The command that runs `argv` here. The process id stays that of the program."""
        return ["nsenter", f"--net=/run/netns/{self.name}", "--", *map(str, argv)]

    def start(self, argv: Sequence[object], log: Path | str | None = None, env: Mapping[str, str] | None = None,
              cwd: Path | str | None = None, stdin: int | IO[bytes] = subprocess.DEVNULL) -> Program:
        """Starts a program; what it prints is appended to `log`, or thrown away."""
        log = Path(log) if log else None
        with open(log or os.devnull, "ab") as out:
            process = subprocess.Popen(self.argv(argv), stdin=stdin, stdout=out, stderr=out, cwd=cwd,
                                       env={**os.environ, **(env or {})}, start_new_session=True)
        program = Program(self, [str(word) for word in argv], process, log)
        self.programs = [*(other for other in self.programs if other.alive()), program]
        return program

    def run(self, argv: Sequence[object], stdin: str = "", seconds: float = 60, check: bool = True,
            env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a program to its end and gives its exit code and what it printed; a code other than 0 is an error,
        unless `check` is false."""
        said = f"on {self.name}, {shlex.join(map(str, argv))[:300]}"
        try:
            done = subprocess.run(self.argv(argv), input=stdin, capture_output=True, text=True, errors="replace",
                                  timeout=seconds, env={**os.environ, **(env or {})})
        except subprocess.TimeoutExpired:
            raise Failed(f"{said}: not done in {seconds} s") from None
        if check and done.returncode != 0:
            raise Failed(f"{said}: exit code {done.returncode}: {(done.stderr or done.stdout).strip()[-800:]}")
        return done

    def sh(self, script: str, stdin: str = "") -> str:
        """Runs a shell script that must succeed, and gives what it printed."""
        return self.run(["sh", "-ec", script], stdin=stdin).stdout

    def rule(self) -> None:
        """Makes the host's rules what the lab's state says, all at once: no packet meets half of them."""
        lines = ["*raw"]
        for end in self.ends:
            lines.append(f":in-{end.device} - [0:0]")
            lines += [f"-A in-{end.device} {rule}" for rule in end.rules()]
        lines += ["COMMIT", "*mangle", ":cut - [0:0]"]
        lines += [f"-A cut {pair} -j DROP" for pair in self.lab.pairs(self.lab.cuts, self)]
        lines += ["COMMIT", "*filter", ":reset - [0:0]"]
        # But for the resets themselves, which would not arrive.
        lines += [f"-A reset -p tcp {pair} ! --tcp-flags RST RST -j REJECT --reject-with tcp-reset"
                  for pair in self.lab.pairs(self.lab.resets, self)]
        self.sh("iptables-restore --noflush", stdin="\n".join([*lines, "COMMIT", ""]))


class End:
    """Where a host has its link, and what happens to that which arrives there."""

    def __init__(self, host: Host, address: Address) -> None:
        self.host, self.address, self.device = host, address, f"eth{len(host.ends)}"
        # Locally administered, and the address: so that both ends know each other, and no packet asks.
        self.mac = ":".join(f"{byte:02x}" for byte in b"\x02\x00" + address.packed)
        self.peer: End
        self.conditions = Conditions()
        self.wire: subprocess.Popen | None = None

    def connect(self, peer: "End") -> None:
        self.peer = peer
        self.host.ends.append(self)
        self.host.sh(
            f"ip link set {self.device} address {self.mac} addrgenmode none up; "
            f"ip address add {self.address}/30 dev {self.device}; "
            f"ip neighbour replace {peer.address} lladdr {peer.mac} dev {self.device} nud permanent; "
            f"iptables -t raw -N in-{self.device}; "
            f"iptables -t raw -A PREROUTING -i {self.device} -j in-{self.device}")

    def rules(self) -> Iterator[str]:
        """What iptables does with that which arrives."""
        if self.conditions.loss == 100:
            yield "-j DROP"
        elif self.conditions.loss:
            yield f"-m statistic --mode random --probability {self.conditions.loss / 100:.8f} -j DROP"
        if self.wire:
            yield f"-j NFQUEUE --queue-num {self.host.ends.index(self)}"

    def set(self, conditions: Conditions) -> None:
        """Changes what comes to this end, while it comes."""
        before, self.conditions = self.conditions, conditions
        rates = (before.rate, before.queue) != (conditions.rate, conditions.queue)
        delays = (before.delay, before.jitter) != (conditions.delay, conditions.jitter)
        if rates or (delays and self._netem):
            self._shape()
        if delays and not self._netem:
            self._delay()
        if (before.loss > 0) != (conditions.loss > 0):
            # The kernel hands packets of 64 KB from host to host, to cut them where hardware would. Such a one is lost
            # as a whole, and no network loses 44 packets for one: where there is loss, they are cut when they are sent.
            count = 1 if conditions.loss else 65535
            self.peer.host.sh(f"ip link set {self.peer.device} gso_max_segs {count}")
        self.host.rule()

    @property
    def _netem(self) -> bool:
        return self.host.lab.netem

    def _shape(self) -> None:
        """By what the other end sends through."""
        now, device = self.conditions, self.peer.device
        bytes_a_second = (now.rate or 0) * 1e6 / 8
        words = []
        if self._netem and (now.rate or now.delay):
            # Counts packets, of both what waits for the rate and what is under way.
            limit = int(bytes_a_second * (now.queue + now.delay) / 1e3 / PACKET) + 100 if now.rate else 20_000
            words = ["netem", "limit", limit, "delay", f"{now.delay}ms", f"{now.jitter}ms"]
            words += ["rate", f"{now.rate * 1e3:.0f}kbit"] if now.rate else []
        elif now.rate:
            burst = max(bytes_a_second * BURST, 2 * PACKET)
            limit = max(bytes_a_second * now.queue / 1e3, 10 * PACKET)
            words = ["tbf", "rate", f"{now.rate * 1e3:.0f}kbit", "burst", f"{burst:.0f}", "limit", f"{limit:.0f}"]
        if words:
            self.peer.host.run(["tc", "qdisc", "replace", "dev", device, "root", *words])
        else:
            self.peer.host.run(["tc", "qdisc", "delete", "dev", device, "root"], check=False)

    def _delay(self) -> None:
        """By a wire, which stays when there is no delay any more, so that what is under way is not overtaken."""
        if not self.wire:
            self.wire = subprocess.Popen(
                self.host.argv([os.environ[WIRE], self.host.ends.index(self)]), bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            # Else the delay is as exact as the machine is idle. Where that is not allowed, so it is.
            with contextlib.suppress(PermissionError):
                os.sched_setscheduler(self.wire.pid, os.SCHED_RR, os.sched_param(1))
        now = self.conditions
        try:
            self.wire.stdin.write(f"{now.delay * 1e3:.0f} {now.jitter * 1e3:.0f}\n".encode())
            answer = self.wire.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if answer != b"ok\n":
            raise Failed(f"the wire to {self.host.name} {self.device} has ended; it has said why on standard error")


class Link:
    """Two hosts, joined. Made by `Lab.link`; every `set` takes effect at once, while traffic runs."""

    def __init__(self, lab: "Lab", a: End, b: End) -> None:
        self.lab, self.a, self.b = lab, a, b

    def set(self, towards: Host | None = None, **changes: float | None) -> None:
        """Changes some conditions of both directions, or of that towards one host; the others stay as they are."""
        with self.lab.lock:
            for end in self._ends(towards):
                end.set(dataclasses.replace(end.conditions, **changes))

    def conditions(self, towards: Host) -> Conditions:
        return self._ends(towards)[0].conditions

    def address(self, host: Host) -> str:
        """Of that host on this link."""
        return str(self._ends(host)[0].address)

    def _ends(self, host: Host | None) -> list[End]:
        ends = [end for end in (self.a, self.b) if host in (None, end.host)]
        if not ends:
            raise ValueError(f"{host.name} is not at the link of {self.a.host.name} and {self.b.host.name}")
        return ends


class Lab:
    """All hosts and links, within what `enter` has made. Its methods may be called from several threads."""

    def __init__(self, netem: bool | None = None) -> None:
        """`netem` says whether the kernel's does delay, jitter and rate; unsaid, it does where there is one."""
        if os.getpid() != 1 or WIRE not in os.environ:
            raise RuntimeError("a lab is inside namespaces of its own: call enter() first")
        self.hosts: dict[str, Host] = {}
        self.links: list[Link] = []
        # Who does not reach whom, and whose TCP is reset: pairs of the names of a sender and a receiver.
        self.cuts: set[tuple[str, str]] = set()
        self.resets: set[tuple[str, str]] = set()
        self.lock = threading.RLock()
        self.subnets = NETWORK.subnets(new_prefix=30)
        self.netem = self._has_netem() if netem is None else netem

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all programs. All else ends with the namespaces."""
        for host in self.hosts.values():
            for program in host.programs:
                program.kill()

    def host(self, name: str) -> Host:
        """A machine without a link yet. Names are those of network namespaces, and resolve everywhere in the lab."""
        return self._host(name, forwards=False, nat=False)

    def router(self, name: str, nat: bool = False) -> Host:
        """A machine that forwards. With `nat`, the way an access router does: what leaves towards the host that its own
        link was made to has the router's address, and nothing behind it can be reached from there."""
        return self._host(name, forwards=True, nat=nat)

    def link(self, a: Host, b: Host, **conditions: float | None) -> Link:
        """Joins two hosts. `a` is below: its default route goes to `b`, if that is a router; if only `a` is one, and
        not NAT, then the other way. The conditions are those of each direction; see `Conditions`."""
        with self.lock:
            wanted = Conditions(**conditions)
            first, second = list(next(self.subnets).hosts())
            below, above = End(a, first), End(b, second)
            _do(f"ip link add {below.device} netns {a.name} type veth peer name {above.device} netns {b.name}")
            below.connect(above)
            above.connect(below)
            if b.forwards:
                a.sh(f"ip route replace default via {second}")
            elif a.forwards and not a.nat:
                b.sh(f"ip route replace default via {first}")
            if a.nat:
                a.sh(f"iptables -t nat -A POSTROUTING -o {below.device} -j MASQUERADE")
            for end in (below, above):
                end.set(wanted)
            link = Link(self, below, above)
            self.links.append(link)
            self._name()
            return link

    def partition(self, a: Host, b: Host, one_way: bool = False) -> None:
        """Neither reaches the other, wherever between them the way goes; with `one_way`, only `a` does not reach `b`.
        Nobody is told: packets vanish."""
        with self.lock:
            self.cuts |= {(a.name, b.name)} | (set() if one_way else {(b.name, a.name)})
            self._rule(a, b)

    def reset(self, a: Host, b: Host) -> None:
        """Every TCP packet between the two is answered by a reset, until `heal`: a connection ends for the side that
        sends next, as it does where a firewall has forgotten it, and new ones are refused."""
        with self.lock:
            self.resets |= {(a.name, b.name), (b.name, a.name)}
            self._rule(a, b)

    def heal(self, a: Host, b: Host) -> None:
        """Ends a partition and a reset."""
        with self.lock:
            pairs = {(a.name, b.name), (b.name, a.name)}
            self.cuts -= pairs
            self.resets -= pairs
            self._rule(a, b)

    def pairs(self, pairs: set[tuple[str, str]], host: Host) -> Iterator[str]:
        """Of these, what a host has to do with: as iptables names them."""
        for sender, receiver in sorted(pairs):
            if host.forwards or host.name in (sender, receiver):
                for source in self.hosts[sender].ends:
                    yield from (f"-s {source.address} -d {end.address}" for end in self.hosts[receiver].ends)

    def _rule(self, a: Host, b: Host) -> None:
        """On the routers too: behind NAT, only they see who speaks to whom."""
        for host in self.hosts.values():
            if host.forwards or host in (a, b):
                host.rule()

    def _host(self, name: str, forwards: bool, nat: bool) -> Host:
        with self.lock:
            if name in self.hosts:
                raise ValueError(f"there is a host {name} already")
            self.hosts[name] = Host(self, name, forwards, nat)
            return self.hosts[name]

    def _name(self) -> None:
        lines = [f"{host.address} {host.name}\n" for host in self.hosts.values() if host.ends]
        Path("/etc/hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))

    @staticmethod
    def _has_netem() -> bool:
        tried = subprocess.run(["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"],
                               capture_output=True)
        if tried.returncode == 0:
            subprocess.run(["tc", "qdisc", "delete", "dev", "lo", "root"], check=True)
        return tried.returncode == 0


def until(what: str, seconds: float, attempt: Callable[[], T], pause: float = 0.05) -> T:
    """Repeats `attempt` until it returns something, and returns that. Its last failure is the cause when time is up."""
    deadline, cause = time.monotonic() + seconds, None
    while True:
        try:
            if found := attempt():
                return found
        except (Failed, AssertionError, OSError) as failure:
            cause = failure
        if time.monotonic() > deadline:
            raise Failed(f"not within {seconds} s: {what}" + (f" ({cause})" if cause else ""))
        time.sleep(pause)
