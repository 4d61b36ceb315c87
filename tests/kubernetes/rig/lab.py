"""The rig's hosts: network, mount and UTS namespaces on one machine, joined by bridges and cables as in the picture.

                            wan 10.77.0.0/24
       cloud (10.77.0.1) ------+------+------ router of site b (10.77.0.12, NAT) --- edge-b (192.168.1.10)
                                      |
                                      +------ router of site a (10.77.0.11, NAT) --- edge-a (192.168.1.10)

Where there are several gateways, each is a host of its own on the wan, and the cloud has the load balancer.
The whole rig runs inside namespaces of its own (see `run`), so that the end of its first process ends everything here:
processes, networks and mounts. A host sees the machine's files; what it writes under /etc, /opt, /run, /usr/local and
/var is its own.
"""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

CLOUD = "10.77.0.1"
EDGE = "192.168.1.10"
ROUTERS = {"a": "10.77.0.11", "b": "10.77.0.12"}
# What a host may write without the machine, or another host, seeing it.
OWN = ["etc", "opt", "usr/local", "var"]
# An overlay cannot lie on an overlay, and containerd makes overlays here; kubelet and etcd want a plain file system too.
PLAIN = ["var/lib/containerd", "var/lib/kubelet", "var/lib/etcd"]
# A kubelet sets these for the whole machine, unless it finds them as it wants them: so that is what it finds.
SYSCTLS = {"vm/overcommit_memory": 1, "vm/panic_on_oom": 0, "kernel/panic": 10, "kernel/panic_on_oops": 1,
           "kernel/keys/root_maxkeys": 1000000, "kernel/keys/root_maxbytes": 25000000}


class Failed(Exception):
    """A command that ended otherwise than it should."""


def check(condition, text):
    """Like `assert`, with words, and never optimised away."""
    if not condition:
        raise AssertionError(text)


def until(what, seconds, attempt, pause=0.2):
    """Repeats `attempt` until it returns something, and returns that. Its last failure is the cause when time is up."""
    deadline = time.monotonic() + seconds
    cause = None
    while True:
        try:
            if found := attempt():
                return found
        except (Failed, AssertionError, OSError) as failure:
            cause = failure
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}" + (f" ({cause})" if cause else ""))
        time.sleep(pause)


class Daemon:
    """A program that runs on a host until it is stopped, with its output in a log file."""

    def __init__(self, name, argv, log, env=None):
        self.name, self.log = name, log
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True)

    def program(self):
        """The process id of the program itself, where a launcher such as runuser has started it and waits for it."""
        if Path(f"/proc/{self.process.pid}/comm").read_text().strip() != "runuser":
            return self.process.pid
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])

    def alive(self):
        return self.process.poll() is None

    def send(self, number):
        if self.alive():
            os.kill(self.program(), number)

    def stop(self, number=signal.SIGTERM, seconds=30):
        self.send(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{self.name} did not stop within {seconds} s") from None

    def text(self, offset=0):
        return self.log.read_text(errors="replace")[offset:]

    def tail(self, lines=15):
        return "\n".join(self.text().splitlines()[-lines:])


class Host:
    """A machine of the rig: namespaces, held open by one sleeping process."""

    def __init__(self, lab, name):
        self.lab, self.name = lab, name
        self.root = lab.folder / name
        self.daemons = {}
        script = self._setup()
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "--net", "--uts", "--propagation", "private", "sh", "-ec", script],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        check(self.holder.stdout.readline() == b"up\n", f"host {name} did not come up")

    def _setup(self):
        lines = ["mount --make-rshared /", "mount -t tmpfs tmpfs /run", f"hostname {self.name}"]
        for own in OWN:
            upper, work = self.root / own / "upper", self.root / own / "work"
            lines.append(f"mkdir -p {upper} {work}")
            lines.append(f"mount -t overlay overlay -o lowerdir=/{own},upperdir={upper},workdir={work} /{own}")
        for plain in PLAIN:
            folder = self.root / "plain" / plain
            lines.append(f"mkdir -p {folder} /{plain}; mount --bind {folder} /{plain}")
        for name, value in SYSCTLS.items():
            shown = self.root / name.replace("/", ".")
            lines.append(f"echo {value} > {shown}; mount --bind {shown} /proc/sys/{name}")
        lines.append(f"printf '127.0.0.1 localhost\\n{CLOUD} cloud gateway.example\\n' > /etc/hosts")
        lines.append("rm -f /etc/resolv.conf; : > /etc/resolv.conf")
        lines.append("ip link set lo up; echo up; exec sleep infinity")
        return "\n".join(lines)

    def argv(self, *command):
        return ["nsenter", "-t", str(self.holder.pid), "-m", "-n", "-u", "--", *map(str, command)]

    def run(self, *command, stdin=None, seconds=60, env=None):
        """Runs to its end and gives (exit code, stdout, stderr), whatever the code is. Bytes in, text out."""
        argv = self.argv(*command)
        try:
            done = subprocess.run(argv, input=stdin or b"", capture_output=True, timeout=seconds,
                                  env={**os.environ, **(env or {})})
        except subprocess.TimeoutExpired:
            raise Failed(f"on {self.name}, not done in {seconds} s: {shlex.join(map(str, command))}") from None
        return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")

    def do(self, *command, **options):
        """Runs what must succeed, and gives what it printed."""
        code, out, err = self.run(*command, **options)
        if code != 0:
            said = (err or out).strip()[-800:]
            raise Failed(f"on {self.name}, {shlex.join(map(str, command))[:300]}: exit code {code}: {said}")
        return out

    def sh(self, script, **options):
        return self.do("sh", "-ec", script, **options)

    def write(self, path, text, mode=0o644):
        """A file of this host, there as a whole at once. As everything here, seen by this host alone."""
        script = f"mkdir -p $(dirname {path}); cat > {path}.new; chmod {mode:o} {path}.new; mv {path}.new {path}"
        self.sh(script, stdin=text.encode())

    def read(self, path):
        return self.do("cat", path)

    def start(self, name, *command, env=None):
        check(name not in self.daemons or not self.daemons[name].alive(), f"{name} runs already on {self.name}")
        log = self.lab.logs / f"{self.name}-{name}.log"
        daemon = Daemon(name, self.argv(*command), log, {**os.environ, **(env or {})})
        self.daemons[name] = daemon
        return daemon


class Lab:
    """All hosts and what joins them."""

    def __init__(self, folder, logs):
        self.folder, self.logs = Path(folder), Path(logs)
        self.sh("ip link set lo up; ip link add wan type bridge; ip link set wan up")
        self.cloud = Host(self, "cloud")
        self.cable(self.cloud, f"{CLOUD}/24", "wan0")
        self.sites = {site: self.site(site) for site in ROUTERS}
        self.towards("a")
        self.others = []

    @property
    def hosts(self):
        """All on which programs run."""
        return [self.cloud, *self.others, *self.edges]

    def another(self, name, address):
        """One more host on the wan."""
        host = Host(self, name)
        self.others.append(host)
        self.cable(host, f"{address}/24", "wan0")
        return host

    def towards(self, site):
        """The cloud knows a way to the edges of one site, so that only the router's rule keeps it out."""
        self.cloud.sh(f"ip route replace 192.168.1.0/24 via {ROUTERS[site]}")

    @property
    def edges(self):
        return [edge for _, edge in self.sites.values()]

    def sh(self, script):
        subprocess.run(["sh", "-ec", script], check=True)

    def cable(self, host, address, name):
        """Plugs a host into the wan."""
        end = f"{host.name}-wan"[:15]
        self.sh(f"ip link add {end} type veth peer name {name} netns {host.holder.pid}; "
                f"ip link set {end} master wan up")
        host.sh(f"ip address add {address} dev {name}; ip link set {name} up")

    def site(self, site):
        """An edge behind a router that translates what goes out, and lets nothing in."""
        router, edge = Host(self, f"router-{site}"), Host(self, f"edge-{site}")
        self.cable(router, f"{ROUTERS[site]}/24", "wan0")
        self.sh(f"ip link add lan-{site} type veth peer name eth0 netns {edge.holder.pid}; "
                f"ip link set lan-{site} netns {router.holder.pid} name lan0")
        router.sh("ip address add 192.168.1.1/24 dev lan0; ip link set lan0 up; "
                  "echo 1 > /proc/sys/net/ipv4/ip_forward; "
                  "iptables -t nat -A POSTROUTING -o wan0 -j MASQUERADE; "
                  "iptables -A FORWARD -i wan0 -m conntrack --ctstate NEW -j DROP")
        edge.sh(f"ip address add {EDGE}/24 dev eth0; ip link set eth0 up; ip route add default via 192.168.1.1; "
                "echo 1 > /proc/sys/net/ipv4/ip_forward")
        return router, edge

    def stop(self):
        for host in self.hosts:
            for daemon in reversed(host.daemons.values()):
                if daemon.alive():
                    daemon.process.kill()
