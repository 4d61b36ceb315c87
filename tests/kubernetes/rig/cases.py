"""What must work, each case an assertion on what the real programs print. Numbered as the points of the promise:

 1 egress selector   2 kubectl   3 many streams   4 webhooks and grants   5 the right node   6 rotation   7 restarts
"""

import base64
import calendar
import hashlib
import ipaddress
import itertools
import json
import os
import signal
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from cluster import AUDIT_LOG, PKI, pod
from lab import EDGE, Failed, check, until

HEARTBEAT = 10  # The gateway's default period, in seconds.
TICK = 0.25
MiB = 1 << 20


def uptime():
    return float(open("/proc/uptime").read().split()[0])


def workload(edge):
    """The pod that most cases talk to: a shell, a web server with a known file, an echo, and a clock in its log."""
    return pod(f"on-{edge}", edge, ["sh", "-c", """
        dd if=/dev/urandom of=/data/5m bs=1M count=5 2> /dev/null
        (cd /data && httpd -p 8080)
        nc -lk -p 9000 -e cat &
        while :; do read up idle < /proc/uptime; echo tick $up; sleep 0.25; done"""])


class Cases:
    """The cases, and what they need of the rig."""

    def __init__(self, lab, cluster, tunnel):
        self.lab, self.cluster, self.tunnel, self.cloud = lab, cluster, tunnel, lab.cloud
        self.edges = {edge.name: edge for edge in lab.edges}

    def prepare(self):
        self.cluster.apply(*(workload(edge) for edge in self.edges),
                           *(pod(f"cat-on-{edge}", edge, ["cat"], container={"stdin": True}) for edge in self.edges))
        self.cluster.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s", seconds=70)

    def streams(self):
        return self.tunnel.metric(self.cloud, "gateway", "tunnel_server_streams_active")

    # Before there is a tunnel

    def edges_cannot_be_dialled(self):
        for site, (router, edge) in self.lab.sites.items():
            code, _, err = self.cloud.run("curl", "-sk", "--max-time", "2", f"https://{EDGE}:10250/healthz")
            check(code == 28, f"a direct dial should time out, and ended with {code}: {err}")
            break
        dropped = self.lab.sites["a"][0].do("iptables", "-nvxL", "FORWARD").splitlines()[2].split()[0]
        check(int(dropped) > 0, "the router's rule has dropped nothing")
        both = {edge.do("hostname", "-I").split()[0] for edge in self.edges.values()}
        check(both == {EDGE}, f"the edges' addresses are {both}")
        return f"timed out; {dropped} packets dropped at the router; both edges are {EDGE}"

    def nothing_works_without_a_tunnel(self, kubectl):
        _, out, err = kubectl.run("exec", "--request-timeout=5s", "on-edge-a", "--", "hostname", seconds=90)
        check(not out, "kubectl exec worked without a tunnel: the rig proves nothing")
        return err.strip().splitlines()[-1]

    # 2: kubectl

    def exec_runs_and_exits(self, kubectl):
        for edge in self.edges:
            code, out, err = kubectl.run("exec", f"on-{edge}", "--", "sh", "-c", "hostname; echo oops >&2; exit 42")
            check((code, out) == (42, f"on-{edge}\n") and "oops" in err, f"{code} {out!r} {err!r}")

    def exec_takes_stdin(self, kubectl):
        data = os.urandom(3 * MiB)
        out = kubectl.do("exec", "-i", "on-edge-a", "--", "sha256sum", stdin=data)
        check(out.split()[0] == hashlib.sha256(data).hexdigest(), f"the sum of 3 MiB of stdin differs: {out}")

    def exec_in_a_terminal(self, kubectl):
        with kubectl.terminal("exec", "-it", "on-edge-a", "--", "sh") as terminal:
            terminal.resize(40, 100)
            terminal.expect("# ")
            for rows, columns in ((40, 100), (51, 132), (24, 80)):
                terminal.resize(rows, columns)
                size = f"{rows} {columns}"

                def shown(size=size):
                    terminal.type("stty size\n")
                    return terminal.expect(r"(\d+ \d+)\r\n.*# ").group(1) == size
                until(f"the shell sees {size}", 5, shown)
            terminal.type("exit 7\n")
            code = terminal.exit_code()
        check(code == 7, f"the terminal's command ended with {code}, not 7")

    def attach_talks(self, kubectl):
        with kubectl.follow("attach", "-i", "cat-on-edge-a", stdin=True) as running:
            for number in range(3):
                said = f"said {number} {time.monotonic()}"
                running.send(said + "\n")
                running.line(10, lambda line, said=said: line == said)

    def logs_are_shown(self, kubectl):
        lines = kubectl.do("logs", "on-edge-b", "--tail=3").splitlines()
        check(len(lines) == 3 and all(line.startswith("tick ") for line in lines), f"{lines}")

    def logs_follow(self, kubectl):
        with kubectl.follow("logs", "-f", "--tail=0", "on-edge-a") as running:
            delays = []
            for _ in range(12):
                ticked = float(running.line(5).split()[1])
                delays.append(uptime() - ticked)
        check(max(delays) < 1, f"lines were late by {delays}")
        return f"lines after {statistics.median(delays) * 1000:.0f} ms (median), {max(delays) * 1000:.0f} ms (worst)"

    def forward_carries(self, kubectl):
        wanted = kubectl.do("exec", "on-edge-a", "--", "sha256sum", "/data/5m").split()[0]
        running, port = kubectl.forward("on-edge-a", 8080)

        def fetch(_):
            return self.cloud.do("sh", "-c", f"curl -sS --fail --max-time 30 http://127.0.0.1:{port}/5m | sha256sum").split()[0]
        with running, ThreadPoolExecutor(8) as pool:
            sums = list(pool.map(fetch, range(16)))
        check(set(sums) == {wanted}, f"downloads differ: {set(sums)}")
        return "16 downloads of 5 MiB, 8 at a time"

    def cp_both_ways(self, kubectl, size):
        source, back = self.lab.folder / "cp-source", self.lab.folder / "cp-back"
        try:
            digest = hashlib.sha256()
            with open(source, "wb") as file:
                for _ in range(size // MiB):
                    block = os.urandom(MiB)
                    digest.update(block)
                    file.write(block)
            begun = time.monotonic()
            kubectl.do("cp", str(source), "on-edge-a:/data/copied", seconds=180)
            up = time.monotonic() - begun
            there = kubectl.do("exec", "on-edge-a", "--", "sha256sum", "/data/copied").split()[0]
            begun = time.monotonic()
            kubectl.do("cp", "on-edge-a:/data/copied", str(back), seconds=180)
            down = time.monotonic() - begun
            here = hashlib.sha256(back.read_bytes()).hexdigest()
            check(there == digest.hexdigest() == here, "the sums differ")
            return f"{size // MiB} MiB up in {up:.1f} s, down in {down:.1f} s"
        finally:
            kubectl.do("exec", "on-edge-a", "--", "rm", "-f", "/data/copied")
            source.unlink(missing_ok=True)
            back.unlink(missing_ok=True)

    def uses_its_protocol(self, kubectl):
        """kube-apiserver's audit log says who streamed, and how."""
        self.cloud.sh(f": > {AUDIT_LOG}")
        kubectl.do("exec", "on-edge-a", "--", "true")
        running, port = kubectl.forward("on-edge-a", 8080)
        with running:
            self.cloud.do("curl", "-sS", "--fail", "-o", "/dev/null", f"http://127.0.0.1:{port}/5m")
        events = [json.loads(line) for line in self.cloud.read(AUDIT_LOG).splitlines()]
        seen = {(event["objectRef"]["subresource"], event["verb"]) for event in events}
        verb = "get" if kubectl.websockets else "create"
        check(seen == {("exec", verb), ("portforward", verb)}, f"streamed by {sorted(seen)}")
        agent = events[0]["userAgent"]
        check(f"/v{kubectl.version}." in agent, f"streamed by {agent}")
        return agent.split()[0]

    def node_proxy(self, kubectl):
        for edge in self.edges:
            healthy = kubectl.do("get", "--raw", f"/api/v1/nodes/{edge}/proxy/healthz")
            check(healthy == "ok", f"{edge}: {healthy!r}")
            metrics = kubectl.do("get", "--raw", f"/api/v1/nodes/{edge}/proxy/metrics/resource")
            check("node_cpu_usage_seconds_total" in metrics and f'pod="on-{edge}"' in metrics, metrics[:300])

    # 3: many streams

    def chatty_logs_leave_exec_alone(self, kubectl):
        """Measured while the logs are held up by their readers; before that, this one machine is busy filling buffers."""
        self.cluster.apply(pod("chatty", "edge-a", ["sh", "-c", "yes 'as fast as it can, as fast as it can, as fast as it can'"]))
        self.cluster.kubectl("wait", "--for=condition=Ready", "pod/chatty", "--timeout=30s")
        readers, stop = [], threading.Event()
        try:
            without = self.exec_times(kubectl, 20)
            readers = [kubectl.follow("logs", "-f", "chatty") for _ in range(3)]
            with ThreadPoolExecutor(3) as pool:
                slow = [pool.submit(self.read_slowly, reader, stop) for reader in readers]
                try:
                    until("the logs are held up by their readers", 60, self.agent_is_calm)
                    times = self.exec_times(kubectl, 20)
                finally:
                    stop.set()
                read = [task.result() for task in slow]
        finally:
            for reader in readers:
                reader.end(signal.SIGKILL)
            self.cluster.kubectl("delete", "pod", "chatty", "--grace-period=0", "--force", seconds=60)
        check(min(read) > 100 * 1024, f"the readers got no more than {read} bytes")
        shown, alone = (", ".join(f"{t * 1000:.0f}" for t in sorted(some)) for some in (times, without))
        check(sorted(times)[-2] < 0.5 and max(times) < 1, f"exec took {shown} ms; without the readers {alone} ms")
        return f"exec {statistics.median(times) * 1000:.0f} ms (median), {max(times) * 1000:.0f} ms (worst of 20); without readers {statistics.median(without) * 1000:.0f} ms"

    def agent_is_calm(self):
        """Whether the agent on edge-a has next to nothing to carry: a twentieth of a processor, over a second."""
        pid = self.edges["edge-a"].daemons["tunnel-edge"].program()

        def ticks():
            fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])
        before = ticks()
        time.sleep(1)
        return ticks() - before < os.sysconf("SC_CLK_TCK") / 20

    @staticmethod
    def read_slowly(reader, stop):
        """A person's terminal over a thin line: 4 KiB, ten times a second. How much it got."""
        total = 0
        while not stop.is_set():
            total += len(reader.more(10, 4096))
            time.sleep(0.1)
        return total

    @staticmethod
    def exec_times(kubectl, count):
        times = []
        for _ in range(count):
            begun = time.monotonic()
            kubectl.do("exec", "on-edge-a", "--", "true")
            times.append(time.monotonic() - begun)
        return times

    def processes(self):
        """Open files and memory of the gateway and the agents."""
        found = {}
        for host, daemon in [(self.cloud, "tunnel-server")] + [(edge, "tunnel-edge") for edge in self.edges.values()]:
            pid = host.daemons[daemon].program()
            resident = next(line for line in open(f"/proc/{pid}/status") if line.startswith("VmRSS"))
            found[f"{host.name} {daemon}"] = (len(os.listdir(f"/proc/{pid}/fd")), int(resident.split()[1]) / 1024)
        return found

    def interrupts_leave_nothing(self, kubectl):
        self.storm(kubectl, 20)  # What is allocated once is allocated now.
        before, streams = self.processes(), self.settled()
        self.storm(kubectl, 100)
        self.settled(streams)
        after = until("as few open files as before", 20, lambda: self.no_more_files(before))
        for name in before:
            grown = after[name][1] - before[name][1]
            check(grown < 8, f"{name} has grown by {grown:.1f} MiB")
        begun = time.monotonic()
        kubectl.do("exec", "on-edge-a", "--", "true")
        check(time.monotonic() - begun < 2, "exec stalls after the storm")
        return "; ".join(f"{name.split()[1]} {before[name][0]} -> {after[name][0]} files, {before[name][1]:.0f} -> {after[name][1]:.0f} MiB"
                         for name in list(before)[:2])

    def settled(self, wanted=None):
        """The streams of the gateway, once there are no more than wanted."""
        if wanted is None:
            return self.streams()
        until(f"no more than {wanted:.0f} streams", 20, lambda: self.streams() <= wanted)
        return wanted

    def no_more_files(self, before):
        now = self.processes()
        for name in before:
            check(now[name][0] <= before[name][0], f"{name}: {before[name][0]} -> {now[name][0]} open files")
        return now

    @staticmethod
    def storm(kubectl, count):
        def one(number):
            running = kubectl.follow("logs", "-f", "on-edge-a")
            time.sleep(0.05 + 0.01 * (number % 40))
            running.end(signal.SIGINT)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, range(count)))

    # 4: webhooks, and grants from the cluster

    def webhooks(self):
        """A webhook in a pod of each node, asked about config maps that name it."""
        for edge in self.edges:
            name = f"webhook-{edge}"
            # Its pod will have one of the node's first addresses.
            network = ipaddress.ip_network(self.cluster.get("node", edge)["spec"]["podCIDR"])
            addresses = [f"IP:{address}" for address in itertools.islice(network.hosts(), 60)]
            self.cluster.issue(name, f"/CN={name}", [f"DNS:{name}.default.svc", *addresses])
            secret = {"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": {"name": name, "namespace": "default"},
                      "data": {f"tls.{kind}": base64.b64encode(self.cloud.read(f"{PKI}/{name}.{kind}").encode()).decode() for kind in ("crt", "key")}}
            mount = {"volumeMounts": [{"name": "tls", "mountPath": "/etc/webhook"}]}
            service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
                       "spec": {"selector": {"app": name}, "ports": [{"port": 443, "targetPort": 8443}]}}
            self.cluster.apply(secret, service, pod(name, edge, ["/webhook"], container=mount,
                                                    volumes=[{"name": "tls", "secret": {"secretName": name}}]))
        self.cluster.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s", seconds=70)
        for edge in self.edges:
            self.ask_webhook(edge, {"service": {"namespace": "default", "name": f"webhook-{edge}", "path": "/admit"}})

    def ask_webhook(self, edge, where):
        """Configures a webhook for config maps with a label, makes one, and reads which node admitted it."""
        authority = base64.b64encode(self.cloud.read(f"{PKI}/ca.crt").encode()).decode()
        webhook = {"name": "asks.edge-tunnel.test", "sideEffects": "None", "admissionReviewVersions": ["v1"], "failurePolicy": "Fail",
                   "timeoutSeconds": 5, "clientConfig": {**where, "caBundle": authority},
                   "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["configmaps"]}],
                   "objectSelector": {"matchLabels": {"ask": edge}}}
        configuration = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
                         "metadata": {"name": f"asks-{edge}"}, "webhooks": [webhook]}
        asked = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"asks-{edge}", "namespace": "default", "labels": {"ask": edge}}}
        self.cluster.apply(configuration)
        try:
            def admitted():
                self.cluster.kubectl("create", "-f", "-", stdin=json.dumps(asked).encode())
                found = self.cluster.get("configmap", f"asks-{edge}")["metadata"].get("annotations", {})
                self.cluster.kubectl("delete", "configmap", f"asks-{edge}")
                return found.get("edge-tunnel.test/admitted-on")
            # A new configuration is not in force at once; until then nobody is asked.
            on = until(f"the webhook on {edge} admits", 15, admitted)
            check(on == edge, f"the webhook on {edge} should have been asked, and {on} was")
        finally:
            self.cluster.kubectl("delete", "mutatingwebhookconfiguration", f"asks-{edge}")

    def webhooks_by_address(self):
        """A webhook by URL is `controlplane` traffic for kube-apiserver, which has a selection of its own."""
        for edge in self.edges:
            address = self.cluster.get("pod", f"webhook-{edge}")["status"]["podIP"]
            self.ask_webhook(edge, {"url": f"https://{address}:8443/admit"})

    def pods_and_services_by_proxy(self, kubectl):
        """kube-apiserver connects the pod itself, by its address."""
        for edge in self.edges:
            for what in (f"pods/https:webhook-{edge}:8443", f"services/https:webhook-{edge}:443"):
                answer = kubectl.do("get", "--raw", f"/api/v1/namespaces/default/{what}/proxy/node")
                check(answer.strip() == edge, f"{what} was answered by {answer!r}")

    def least_privilege(self, kubectl):
        user = "--as=system:serviceaccount:edge-tunnel:gateway"
        allowed = {verb for verb in ("get", "list", "watch", "create", "update", "patch", "delete")
                   if kubectl.run("auth", "can-i", verb, "nodes", user)[1].strip() == "yes"}
        check(allowed == {"get", "list", "watch"}, f"the gateway may {sorted(allowed)} nodes")
        for what in ("get pods", "list secrets", "get nodes --subresource=proxy", "create nodes --subresource=proxy", "list configmaps"):
            answer = kubectl.run("auth", "can-i", *what.split(), "-A", user)[1].strip()
            check(answer == "no", f"the gateway may {what}")
        known = self.tunnel.metric(self.cloud, "gateway", "tunnel_server_cluster_nodes")
        check(known == 2, f"the gateway knows {known} nodes")
        return "get, list and watch of nodes; nothing else"

    def nodes_come_and_go(self):
        before = self.tunnel.metric(self.cloud, "gateway", "tunnel_server_cluster_nodes")
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "edge-z"}, "spec": {"podCIDR": "10.245.9.0/24", "podCIDRs": ["10.245.9.0/24"]}}
        self.cluster.apply(node)
        try:
            until("the new node is known", 10, lambda: "node edge-z has no link" in self.connect("10.245.9.7:8443"))
        finally:
            self.cluster.kubectl("delete", "node", "edge-z")
        until("the deleted node is forgotten", 10, lambda: "404" in self.connect("10.245.9.7:8443"))
        check(self.tunnel.metric(self.cloud, "gateway", "tunnel_server_cluster_nodes") == before, "the count of nodes differs")

    def connect(self, target):
        """Asks the gateway itself, with kube-apiserver's certificate. What curl says of the answer."""
        pki = "/etc/edge-tunnel/pki/control-plane"
        if "unix" in self.tunnel.ingress:
            code, out, err = self.cloud.run("sh", "-c", f"printf 'CONNECT {target} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n' | "
                                            "timeout 5 nc -U /run/edge-tunnel/ingress.sock")
            return out
        code, out, err = self.cloud.run("curl", "-sSv", "--max-time", "10", "--proxy", "https://127.0.0.1:8131", "--proxy-cacert", f"{pki}/ca.crt",
                                        "--proxy-cert", f"{pki}/client.crt", "--proxy-key", f"{pki}/client.key", "-k", f"https://{target}/admit")
        return out + err

    def without_an_apiserver(self):
        """What the gateway knew stays, by name and by pod address."""
        addresses = {edge: self.cluster.get("pod", f"webhook-{edge}")["status"]["podIP"] for edge in self.edges}
        self.cluster.stop_apiserver()
        try:
            for edge, address in addresses.items():
                for target in (f"{address}:8443", f"{edge}:10250"):
                    answer = self.connect(target)
                    check("200 OK" in answer, f"{target}: {answer[-400:]}")
            check(self.tunnel.ready(self.cloud, "gateway"), "the gateway is not ready")
        finally:
            self.cluster.restart_apiserver()
        until("the gateway watches again", 60, lambda: self.tunnel.metric(self.cloud, "gateway", "tunnel_server_cluster_in_sync") == 1)

    # 5: the right node

    def never_the_wrong_node(self, kubectl):
        def ask(number):
            edge = list(self.edges)[number % 2]
            if number % 3 == 0:
                pods = json.loads(kubectl.do("get", "--raw", f"/api/v1/nodes/{edge}/proxy/pods"))["items"]
                names = {item["metadata"]["name"] for item in pods}
                return f"on-{edge}" in names and not any(name.startswith("on-") and name != f"on-{edge}" for name in names)
            return kubectl.do("exec", f"on-{edge}", "--", "hostname").strip() == f"on-{edge}"
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, range(90)))
        check(all(answers), f"{answers.count(False)} of {len(answers)} came from the wrong node")
        return f"{len(answers)} answers, all from the node that was asked"

    def a_node_that_goes_away(self, kubectl):
        router, edge = self.lab.sites["b"]
        with kubectl.follow("logs", "-f", "--tail=0", "on-edge-a") as other, kubectl.follow("logs", "-f", "--tail=0", "on-edge-b") as gone:
            other.line(5), gone.line(5)
            router.do("iptables", "-I", "FORWARD", "-j", "DROP")
            cut = time.monotonic()
            try:
                words = until("an error that names the cause", 2 * HEARTBEAT + 5, lambda: self.refused(kubectl, "edge-b"), 0.5)
                after = time.monotonic() - cut
                check(after < 2 * HEARTBEAT + 3, f"only after {after:.0f} s")
                ended = gone.wait(10)
                ticked = float(other.line(5).split()[1])
                while uptime() - ticked > 1:
                    ticked = float(other.line(2).split()[1])
            finally:
                router.do("iptables", "-D", "FORWARD", "-j", "DROP")
        until("edge-b is back", 60, lambda: self.answers(kubectl, "edge-b"), 1)
        return f"after {after:.0f} s: {words}; its logs -f ended with {ended[0]}"

    @staticmethod
    def refused(kubectl, edge):
        code, out, err = kubectl.run("exec", f"on-{edge}", "--", "hostname", seconds=60)
        check(not out, "it still answers")
        check(err.strip(), f"kubectl ended with {code}, and without a word")
        last = err.strip().splitlines()[-1]
        check(f"node {edge}" in last, f"the error does not name the node: {last}")
        return last if "no link" in last else None

    # 6: rotation

    def certificates(self):
        """Of each edge's kubelet: its serial number, and when it ends."""
        found = {}
        for name, edge in self.edges.items():
            text = edge.do("openssl", "x509", "-noout", "-serial", "-enddate", "-in", "/var/lib/kubelet/pki/kubelet-client-current.pem")
            serial, end = (line.partition("=")[2] for line in text.splitlines())
            found[name] = (serial, calendar.timegm(time.strptime(end, "%b %d %H:%M:%S %Y GMT")))
        return found

    def agents_follow_rotation(self, kubectl, first):
        """`first`: the certificates that the agents began with."""
        def expired():
            now = self.certificates()
            check(all(now[edge][0] != first[edge][0] for edge in now), "a kubelet has not rotated its certificate")
            return all(time.time() > end for _, end in first.values())
        until("the first certificates were replaced and have expired", 300, expired, 2)
        for name, edge in self.edges.items():
            until(f"the agent on {name} uses the kubelet's new certificate", 30, lambda name=name, edge=edge: self.tunnel.metric(
                edge, "edge", "tunnel_edge_certificate_expiry_timestamp_seconds") == self.certificates()[name][1])
        return self.never_the_wrong_node(kubectl)

    # 7: restarts

    def gateway_restarts(self, kubectl):
        self.tunnel.stop_gateway()
        _, out, _ = kubectl.run("exec", "on-edge-a", "--", "hostname", seconds=60)
        check(not out, "exec worked without a gateway")
        self.tunnel.start_gateway()
        back = time.monotonic()
        until("exec works again", 30, lambda: self.answers(kubectl, "edge-a"), 0.1)
        took = time.monotonic() - back
        check(took < 5, f"exec worked only {took:.1f} s after the gateway's return")
        return f"exec worked {took:.1f} s after the gateway's return"

    @staticmethod
    def answers(kubectl, edge):
        """By what it prints: over WebSocket kubectl's exit code is 0 now and then though kube-apiserver reached no kubelet."""
        return kubectl.do("exec", f"on-{edge}", "--", "hostname").strip() == f"on-{edge}"

    def killed_amid_cp(self, kubectl):
        """Down and up, at some moments: kubectl either fails, or what it copied is whole."""
        kubectl.do("exec", "on-edge-a", "--", "dd", "if=/dev/urandom", "of=/data/big", "bs=1M", "count=200")
        wanted = kubectl.do("exec", "on-edge-a", "--", "sha256sum", "/data/big").split()[0]
        here, failed = self.lab.folder / "killed-cp", 0
        outcomes = []
        for delay in (0.4, 0.6, 0.8):
            here.unlink(missing_ok=True)
            with kubectl.follow("cp", "on-edge-a:/data/big", str(here)) as running:
                time.sleep(delay)
                self.tunnel.stop_gateway(signal.SIGKILL)
                code, err = running.wait(60)
            size = here.stat().st_size if here.exists() else 0
            self.tunnel.start_gateway()
            self.tunnel.wait_for_links()
            if code == 0:
                whole = here.exists() and hashlib.sha256(here.read_bytes()).hexdigest() == wanted
                check(whole, f"kubectl reported success for {size} bytes of {200 * MiB}")
            else:
                check(err.strip(), "kubectl failed without a word")
                failed += 1
            outcomes.append(f"{'failed' if code else 'whole'} at {size // MiB} MiB")
            here.unlink(missing_ok=True)
        kubectl.do("exec", "on-edge-a", "--", "rm", "/data/big")
        check(failed, f"the gateway was never killed in the middle: {outcomes}")
        return ", ".join(outcomes)

    # Slow: by its own command

    def idle_logs(self, kubectl, seconds):
        """A log that is silent for a long time still shows its next line."""
        with kubectl.follow("logs", "-f", "--tail=0", "cat-on-edge-a") as running:
            time.sleep(seconds)
            said = f"after {seconds} s"
            with kubectl.follow("attach", "-i", "cat-on-edge-a", stdin=True) as speaker:
                speaker.send(said + "\n")
                begun = time.monotonic()
                running.line(5, lambda line: line == said)
        return f"a line came {time.monotonic() - begun:.2f} s after it was written, after {seconds} silent s"
