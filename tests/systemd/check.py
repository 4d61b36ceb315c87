"""Runs the units of deploy/systemd under a real systemd and asserts what they promise: a node that boots before it has a
certificate is waited for and never given up, and a stop has the time that it needs. Called by `run`.

systemd is process 1 of its own mount, process, network and cgroup namespaces, knows only the units of this test, and ends
with it. Nothing of it is seen outside.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATIENCE = 30
# What the units' default dependencies name, and the target that keeps systemd up.
TARGETS = ["sysinit", "basic", "shutdown", "umount", "multi-user", "network-online", "rescue", "emergency"]

EDGE = """\
gateways: ["127.0.0.1:1"]
proxy: none
tls: {cert: /etc/edge-tunnel/edge.crt, key: /etc/edge-tunnel/edge.key, ca: /etc/edge-tunnel/pki/edge/ca.crt}
"""
GATEWAY = """\
gateway_id: gw-1
edges: {listen: "127.0.0.1:0", cert: pki/edge/gateway.crt, key: pki/edge/gateway.key, client_ca: pki/edge/ca.crt}
ingress: {listen: none, unix: /run/edge-tunnel/ingress.sock}
drain: {delay: 5s}
"""

# Inside the namespaces: what systemd finds, then systemd itself.
INIT = """
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/units /run/lock
cp "$STAGE"/units/* /run/units/
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for place in /etc/edge-tunnel /usr/local/bin; do mkdir -p $place; mount -t tmpfs tmpfs $place; done
cp "$STAGE"/bin/* /usr/local/bin/
cp "$STAGE"/etc/* /etc/edge-tunnel/
ip link set lo up
touch "$STAGE"/inside
exec env -i container=edge-tunnel-test SYSTEMD_UNIT_PATH=/run/units PATH=/usr/sbin:/usr/bin:/sbin:/bin \\
    /lib/systemd/systemd --system --unit=multi-user.target --log-target=console --log-level=notice --show-status=no
"""


class Systemd:
    """A systemd that runs, and the way into its namespaces."""

    def __init__(self, programs):
        self.stage = pathlib.Path(tempfile.mkdtemp(prefix="edge-tunnel-systemd-"))
        for name in ["units", "bin", "etc"]:
            (self.stage / name).mkdir()
        for name in ["edge", "server"]:
            unit = (ROOT / f"deploy/systemd/tunnel-{name}.service").read_text()
            # The user of the gateway's unit is made when it is installed.
            unit = unit.replace("User=edge-tunnel\nGroup=edge-tunnel\n", "")
            # The files of the configuration are relative to it.
            (self.stage / f"units/tunnel-{name}.service").write_text(unit)
            shutil.copy(programs / f"tunnel-{name}", self.stage / "bin")
        for name in TARGETS:
            (self.stage / f"units/{name}.target").write_text(f"[Unit]\nDescription={name}\nDefaultDependencies=no\n")
        (self.stage / "etc/edge.yaml").write_text(EDGE)
        (self.stage / "etc/gateway.yaml").write_text(GATEWAY)
        self.cgroup = pathlib.Path(cgroup2()) / f"edge-tunnel-systemd-{os.getpid()}"
        self.cgroup.mkdir()
        self.log = open(self.stage / "log", "wb")
        self.unshare = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child",
             "--propagation=private", "bash", "-c", INIT],
            env={**os.environ, "STAGE": str(self.stage)}, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            preexec_fn=lambda: (self.cgroup / "cgroup.procs").write_text(str(os.getpid())))
        until("systemd runs", lambda: (self.stage / "inside").exists() and self.state() in ("running", "degraded"))

    def pid(self):
        children = pathlib.Path(f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children").read_text().split()
        return children[0] if children else None

    def inside(self, *words, timeout=PATIENCE):
        """Runs a command inside, and gives what it prints."""
        command = ["nsenter", "--target", self.pid(), "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--"]
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=timeout)
        self.code = done.returncode
        return done.stdout.strip() or done.stderr.strip()

    def systemctl(self, *words, **options):
        return self.inside("systemctl", *words, **options)

    def state(self):
        return self.systemctl("is-system-running") if self.pid() else None

    def show(self, unit, name):
        return self.systemctl("show", "--value", "--property", name, unit)

    def write(self, path, text):
        self.inside("sh", "-c", f"printf %s '{text}' > {path}")

    def end(self):
        for pid in filter(None, [self.pid()]):
            os.kill(int(pid), signal.SIGKILL)
        self.unshare.wait()
        self.log.close()
        for path in sorted(self.cgroup.rglob("*/"), reverse=True):
            if path.is_dir():
                path.rmdir()
        self.cgroup.rmdir()
        shutil.rmtree(self.stage)


def cgroup2():
    """Where the unified hierarchy is mounted."""
    for line in pathlib.Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return place
    sys.exit("this machine has no cgroup2 mounted, which systemd needs")


def until(what, condition):
    """Waits until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {PATIENCE} s: {what}")
        time.sleep(0.1)


def an_edge_without_a_certificate_is_started_and_says_what_it_waits_for(systemd):
    said = systemd.systemctl("start", "tunnel-edge", timeout=10)
    assert systemd.code == 0, said
    status = systemd.show("tunnel-edge", "StatusText")
    assert "waiting for /etc/edge-tunnel/edge.crt, which does not exist yet" in status, status
    systemd.inside("sh", "-c", "cd /etc/edge-tunnel && tunnel-server pki init pki && "
                   "tunnel-server pki issue edge edge-a --dir pki --out /run && cp /run/edge-a.crt edge.crt && "
                   "cp /run/edge-a.key edge.key")
    assert systemd.code == 0
    until("the certificate is used", lambda: "not connected" in systemd.show("tunnel-edge", "StatusText"))
    assert systemd.show("tunnel-edge", "NRestarts") == "0"
    systemd.systemctl("stop", "tunnel-edge", timeout=10)
    assert systemd.show("tunnel-edge", "Result") == "success"


def a_configuration_that_is_wrong_is_tried_until_it_is_right(systemd):
    systemd.write("/etc/edge-tunnel/edge.yaml", "gatways: []")
    systemd.systemctl("start", "tunnel-edge", timeout=10)
    assert systemd.code != 0, "it counts as started"
    # systemd gives up after five starts in ten seconds unless told otherwise.
    until("it is started again and again", lambda: int(systemd.show("tunnel-edge", "NRestarts")) > 6)
    assert systemd.show("tunnel-edge", "ActiveState") != "failed"
    systemd.write("/etc/edge-tunnel/edge.yaml", EDGE)
    until("it runs", lambda: systemd.show("tunnel-edge", "ActiveState") == "active")
    systemd.systemctl("stop", "tunnel-edge", timeout=10)


def a_stop_has_the_time_that_the_drain_needs(systemd):
    systemd.inside("sh", "-c", "cd /run/units && sed -i s/TimeoutStopSec=45/TimeoutStopSec=2/ tunnel-server.service && "
                   "sed -i /ExecStart=/iWorkingDirectory=/etc/edge-tunnel tunnel-server.service")
    systemd.systemctl("daemon-reload")
    said = systemd.systemctl("start", "tunnel-server", timeout=10)
    assert systemd.code == 0, said
    until("it works", lambda: systemd.show("tunnel-server", "StatusText") == "working")
    begun = time.monotonic()
    systemd.systemctl("stop", "tunnel-server")
    took, result = time.monotonic() - begun, systemd.show("tunnel-server", "Result")
    assert result == "success" and took > 4, f"{result} after {took:.1f} s"


def main():
    systemd = Systemd(pathlib.Path(sys.argv[1]).resolve())
    passed = failed = 0
    try:
        for case in [an_edge_without_a_certificate_is_started_and_says_what_it_waits_for,
                     a_configuration_that_is_wrong_is_tried_until_it_is_right,
                     a_stop_has_the_time_that_the_drain_needs]:
            try:
                case(systemd)
                passed += 1
                print(f"ok      {case.__name__}", flush=True)
            except (AssertionError, subprocess.TimeoutExpired) as problem:
                failed += 1
                print(f"FAILED  {case.__name__}: {problem}", flush=True)
        if failed:
            print((systemd.stage / "log").read_text(errors="replace")[-4000:])
    finally:
        systemd.end()
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


main()
