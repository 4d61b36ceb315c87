"""Whether the lab keeps its word, measured: by ping, by iperf3, and by one TCP connection at a time. Called by `run`.

The bounds are those of a figure to believe, not of the lab at its best: the machine may be busy beside. Where chance
decides, they are at four deviations.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from netlab.lab import WIRE, Failed, Host, Lab, until

PORT = 4000
# One connection: says whose it is, then gives every line back.
ECHO = f"""
import socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write((self.client_address[0] + "\\n").encode())
        for line in self.rfile:
            self.wfile.write(line)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
Server(("", {PORT}), Echo).serve_forever()
"""
# Says what became of a connection, then of each line that it is given to send: the answer, or the error.
CLIENT = """
import socket, sys
def tell(do):
    try:
        print(do(), flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
def connect():
    global stream
    stream = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1.5)
    return receive()
def receive():
    return stream.recv(100).decode().strip()
tell(connect)
for line in sys.stdin:
    tell(lambda: stream.sendall(line.encode()) or receive())
"""


class Conversation:
    """A TCP connection of a host, with the echo server of another."""

    def __init__(self, host: Host, to: str) -> None:
        self.process = subprocess.Popen(host.argv([sys.executable, "-c", CLIENT, to, PORT]), text=True, bufsize=1,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.first = self.process.stdout.readline().strip()

    def say(self, line: str) -> str:
        self.process.stdin.write(f"{line}\n")
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class Check:
    """Two hosts with a link; and an edge behind NAT, with a cloud on the other side of a wide network."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.rows = lab, []
        self.left, self.right = lab.host("left"), lab.host("right")
        self.link = lab.link(self.left, self.right)
        self.wan, self.site = lab.router("wan"), lab.router("site", nat=True)
        self.cloud, self.edge = lab.host("cloud"), lab.host("edge")
        lab.link(self.cloud, self.wan)
        self.access = lab.link(self.site, self.wan)
        lab.link(self.edge, self.site)
        for host in (self.right, self.cloud):
            host.start([sys.executable, "-c", ECHO])
        self.right.start(["iperf3", "--server"])
        until("the servers listen", 5, self._listening)

    def run(self, only: str = "") -> int:
        """The cases with this text in their name; gives the exit code."""
        begun = time.monotonic()
        print(f"delay and jitter by {'netem' if self.lab.netem else 'the wire'}\n", flush=True)
        for name, case in (
            ("nothing asked for: next to no delay", self.bare),
            ("delay 25 ms: round trip 50 ms", self.delay),
            ("delay 5 ms one way: round trip 5 ms", self.one_way),
            ("delay 40 ms and back, while packets are under way", self.change),
            ("jitter 10 ms around 25 ms, in order", self.jitter),
            ("loss 10 % towards one host", self.loss_one_way),
            ("loss 10 % each way: 19 % of the answers", self.loss),
            ("loss takes packets, not 64 KB", self.single),
            ("loss 100 %: nothing", self.severed),
            ("rate 20 Mbit/s, the other way free", self.slow),
            ("rate 1 Gbit/s at a round trip of 50 ms", self.fast),
            ("no rate at a round trip of 50 ms: what the lab can", self.free),
            ("a partition stops pings, until it heals", self.partition),
            ("a partition one way", self.partition_one_way),
            ("NAT: the router's address outside, no way in", self.nat),
            ("a partition across NAT", self.partition_nat),
            ("a reset ends a connection and refuses new ones", self.reset),
            ("a reset across NAT", self.reset_nat),
            ("killed with -9, nothing of a lab remains", self.killed),
            ("told to end, it ends, with everything", self.terminated),
        ):
            if only in name:
                self._case(name, case)
        failed = sum(not passed for passed in self.rows)
        print(f"\n{len(self.rows) - failed} passed, {failed} failed ({time.monotonic() - begun:.0f} s)", flush=True)
        return 0 if self.rows and not failed else 1

    def _case(self, name: str, case: Callable[[], str]) -> None:
        begun = time.monotonic()
        self.link.set(rate=None, delay=0, jitter=0, loss=0)
        try:
            passed, note = True, case()
        except Exception as failure:  # A mistake here is a failure of the case, not the end of the check.
            known = isinstance(failure, (Failed, AssertionError))
            passed, note = False, f"{failure}" if known else f"{type(failure).__name__}: {failure}"
        self.rows.append(passed)
        seconds = time.monotonic() - begun
        print(f"{'passed' if passed else 'FAILED'}  {name:<52} {seconds:4.1f} s  {note}", flush=True)

    # Delay and jitter.

    def bare(self) -> str:
        times = self._ping(50, 0.005)
        return within(statistics.median(times), 0, 1, "round trip, ms")

    def delay(self) -> str:
        self.link.set(delay=25)
        times = self._ping(100, 0.01)
        assert min(times) >= 49.9, f"a round trip of {min(times)} ms: shorter than was asked for"
        return within(statistics.median(times), 49.9, 51, "round trip, ms")

    def one_way(self) -> str:
        found = []
        for host in (self.left, self.right):
            self.link.set(delay=0)
            self.link.set(towards=host, delay=5)
            found.append(within(statistics.median(self._ping(50, 0.005)), 4.9, 5.8, f"towards {host.name}, ms"))
        return ", ".join(found)

    def change(self) -> str:
        self.link.set(delay=10)
        pings = self._pings(100, 0.01)
        time.sleep(0.4)
        self.link.set(delay=40)
        time.sleep(0.3)
        self.link.set(delay=10)
        times = self._times(pings)
        assert len(times) == 100, f"{100 - len(times)} of 100 packets were lost"
        first, last = statistics.median(times[:20]), statistics.median(times[-15:])
        return ", ".join([within(first, 19.9, 21, "before, ms"), within(sorted(times)[-8], 79.9, 83, "between"),
                          within(last, 19.9, 21, "after")])

    def jitter(self) -> str:
        self.link.set(delay=25, jitter=10)
        times = sorted(self._ping(200, 0.01))
        low, high = times[0], times[-5]  # Four may have met a machine that was busy.
        assert low >= 29.9 and high <= 71, f"{low} to {high} ms is more than 30 to 70"
        mean, deviation = statistics.mean(times), statistics.stdev(times)
        return f"{within(mean, 48, 52.5, 'mean, ms')}, {within(deviation, 4, 9.5, 'deviation')}"

    # Loss.

    def loss_one_way(self) -> str:
        self.link.set(towards=self.right, loss=10)
        return within(100 - len(self._ping(1000, 0)) / 10, 6.2, 13.8, "lost, %")

    def loss(self) -> str:
        self.link.set(loss=10)
        return within(100 - len(self._ping(1000, 0)) / 10, 14, 24, "lost, %")

    def single(self) -> str:
        """The connection is there before the loss: what it then sends must be cut too."""
        transfer = self.left.start(["iperf3", "--client", "right", "--time", 2])
        time.sleep(0.5)
        self.link.set(loss=1)
        self.right.sh("iptables -t raw -Z")
        transfer.wait(10)
        counted = re.search(r"^\s*(\d+)\s+(\d+) in-eth0", self.right.sh("iptables -t raw -vnxL PREROUTING"), re.M)
        packets, size = map(int, counted.groups())
        assert packets > 100, f"only {packets} packets came"
        return within(size / packets, 1000, 1500, f"bytes a packet, of {packets}")

    def severed(self) -> str:
        self.link.set(loss=100)
        return within(len(self._ping(20, 0.01)), 0, 0, "answers")

    # Rate. TCP carries 95.6 % of it at this packet size; the rest is headers.

    def slow(self) -> str:
        self.link.set(towards=self.right, rate=20)
        there, back = self._transfer(2), self._transfer(1, "--reverse")
        return f"{within(there, 17, 19.6, 'Mbit/s')}, {within(back, 200, 1e6, 'other way')}"

    def fast(self) -> str:
        self.link.set(rate=1000, delay=25)
        return within(self._transfer(2, "--parallel", 4, "--omit", 1), 800, 980, "Mbit/s") + self._cost()

    def free(self) -> str:
        self.link.set(delay=25)
        return within(self._transfer(2, "--parallel", 8, "--omit", 1), 1000, 1e6, "Mbit/s") + self._cost()

    # Partitions and resets.

    def partition(self) -> str:
        self.lab.partition(self.left, self.right)
        during = len(self._ping(20, 0.01))
        self.lab.heal(self.left, self.right)
        after = len(self._ping(20, 0.01))
        return f"{within(during, 0, 0, 'answers')}, {within(after, 20, 20, 'healed')}"

    def partition_one_way(self) -> str:
        """What is cut is the way there, or the way back: seen by whether the other host still counts the pings."""
        found = []
        for source, target, expected in ((self.left, self.right, 0), (self.right, self.left, 10)):
            self.lab.partition(source, target, one_way=True)
            before = echoed(self.right)
            answers, reached = len(self._ping(10, 0.01)), echoed(self.right) - before
            self.lab.heal(source, target)
            assert answers == 0, f"{answers} answers from {source.name} to {target.name}"
            found.append(within(reached, expected, expected, f"reached right, cut towards {target.name}"))
        return ", ".join(found)

    def nat(self) -> str:
        conversation = Conversation(self.edge, "cloud")
        conversation.end()
        router = self.access.address(self.site)
        assert conversation.first == router, f"the cloud saw {conversation.first}, not the router's {router}"
        inwards = self.cloud.run(["ping", "-c", 1, "-W", 1, self.edge.address], check=False)
        assert inwards.returncode == 1, "the cloud reached the edge through the router"
        return f"seen as {router}"

    def partition_nat(self) -> str:
        conversation = Conversation(self.edge, "cloud")
        self.lab.partition(self.edge, self.cloud)
        before = echoed(self.cloud)
        self.edge.run(["ping", "-c", 1, "-W", "0.1", "cloud"], check=False)
        reached, during = echoed(self.cloud) - before, conversation.say("a")
        other = Conversation(self.site, "cloud")
        self.lab.heal(self.edge, self.cloud)
        # When TCP tries again, by its own time.
        until("what was sent into the partition is delivered", 8, lambda: "a" in conversation.say("b"))
        conversation.end()
        other.end()
        assert during == "TimeoutError", f"the partition let through {during!r}"
        assert reached == 0, "the way to the cloud is open; only that back is not"
        assert other.first == self.access.address(self.site), f"the router is cut off too: {other.first}"
        return f"{during}, then delivered; the router itself was not cut off"

    def reset(self) -> str:
        return self._reset(self.left, self.right)

    def reset_nat(self) -> str:
        return self._reset(self.edge, self.cloud)

    def _reset(self, client: Host, server: Host) -> str:
        conversation = Conversation(client, server.name)
        said = [conversation.say("a")]
        self.lab.reset(client, server)
        said.append(conversation.say("b"))
        conversation.end()
        for heal in (False, True):
            if heal:
                self.lab.heal(client, server)
            other = Conversation(client, server.name)
            said.append(other.say("c") if heal else other.first)
            other.end()
        expected = ["a", "ConnectionResetError", "ConnectionRefusedError", "c"]
        assert said == expected, f"it went {said}, not {expected}"
        return "reset, refused, healed"

    # The end of a lab: another one, inside of this.

    def killed(self) -> str:
        return self._ended(signal.SIGKILL, -signal.SIGKILL)

    def terminated(self) -> str:
        return self._ended(signal.SIGTERM, 128 + signal.SIGTERM)

    def _ended(self, number: int, expected: int) -> str:
        with tempfile.NamedTemporaryFile() as sign:
            sleep = f"echo up > {sign.name}; exec sleep 4711{number}"
            command = [sys.executable, "-B", Path(__file__).parent, "--delay", "1", "--", "sh", "-c", sleep]
            other = subprocess.Popen(command)
            until("the other lab is up", 10, lambda: Path(sign.name).read_text())
            there = self._foreign(f"4711{number}")
            assert len(there) >= 4, f"the other lab runs but {there}"
            begun = time.monotonic()
            other.send_signal(number)
            code = other.wait(15)
            until("all of the other lab is gone", 5, lambda: not self._foreign(f"4711{number}"))
        assert code == expected, f"its exit code is {code}, not {expected}"
        return f"gone after {(time.monotonic() - begun) * 1e3:.0f} ms"

    def _foreign(self, mark: str) -> list[str]:
        """What runs that is the other lab's: what has its mark, and wires that are not this one's."""
        own = {end.wire.pid for host in self.lab.hosts.values() for end in host.ends if end.wire}
        return [line for process, line in processes().items()
                if mark in line or os.environ[WIRE] in line and process not in own]

    # How it is measured.

    def _pings(self, count: int, interval: float) -> subprocess.Popen:
        # -U: else ping counts until the kernel has received the answer, which is before it was delayed.
        return subprocess.Popen(self.left.argv(["ping", "-U", "-n", "-c", count, "-i", interval, "-W", 1, "right"]),
                                stdout=subprocess.PIPE, text=True)

    def _times(self, pings: subprocess.Popen) -> list[float]:
        answers = re.findall(r"icmp_seq=(\d+) .*time=([\d.]+) ms", pings.communicate()[0])
        order = [int(number) for number, _ in answers]
        assert order == sorted(order), "the answers came out of order"
        return [float(milliseconds) for _, milliseconds in answers]

    def _ping(self, count: int, interval: float) -> list[float]:
        return self._times(self._pings(count, interval))

    def _transfer(self, seconds: int, *options: object) -> float:
        """Megabits a second, as its receiver sees them."""
        self.begun = time.monotonic(), self._worked()
        done = self.left.run(["iperf3", "--client", "right", "--format", "m", "--time", seconds, *options])
        return float(re.findall(r"([\d.]+) Mbits/sec +receiver", done.stdout)[-1])

    def _cost(self) -> str:
        """Of the wires during a transfer, with what the kernel does within them: to receive what they let go."""
        if self.lab.netem:
            return ""
        seconds, worked = time.monotonic() - self.begun[0], self._worked() - self.begun[1]
        return f"; both wires {100 * worked / seconds:.0f} % of a core"

    def _worked(self) -> float:
        fields = [Path(f"/proc/{end.wire.pid}/stat").read_text().rsplit(")", 1)[1].split()
                  for end in (self.link.a, self.link.b) if end.wire]
        return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")

    def _listening(self) -> bool:
        right, cloud = (host.sh("ss -Hltn") for host in (self.right, self.cloud))
        return f":{PORT}" in right and ":5201" in right and f":{PORT}" in cloud


def within(value: float, low: float, high: float, what: str) -> str:
    assert low <= value <= high, f"{what}: {value:.2f}, not {low:g} to {high:g}"
    return f"{what}: {value:.4g}"


def echoed(host: Host) -> int:
    """The pings that have come to a host; the kernel has no such counter before the first."""
    counted = re.search(r"IcmpMsgInType8\s+(\d+)", host.sh("nstat -asz"))
    return int(counted.group(1)) if counted else 0


def processes() -> dict[int, str]:
    """Command lines, of this namespace and those below."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found[int(folder.name)] = (folder / "cmdline").read_text(errors="replace")
        except OSError:
            continue  # It has ended meanwhile.
    return found
