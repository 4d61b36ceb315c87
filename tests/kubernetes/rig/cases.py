"""What must work, each case an assertion on what the real programs print. Numbered as the points of the promise:

 1 egress selector   2 kubectl   3 many streams   4 webhooks and grants   5 the right node   6 rotation   7 restarts
 8 several gateways (several.py)
"""

import base64
import calendar
import functools
import hashlib
import ipaddress
import itertools
import json
import os
import signal
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from cluster import AUDIT_LOG, PKI, pod
from lab import EDGE, check, until

HEARTBEAT = 10  # The gateway's default period, in seconds.
# The watch of the nodes and reading the metrics have connections of their own, which come and go.
FILES_OF_OTHERS = 2
MiB = 1 << 20


def uptime():
    return float(open("/proc/uptime").read().split()[0])


def workload(edge):
    """The pod that most cases talk to: a shell, a web server with a file, and a clock in its log."""
    return pod(f"on-{edge}", edge, ["sh", "-c", """
        dd if=/dev/urandom of=/data/5m bs=1M count=5 2> /dev/null
        (cd /data && httpd -p 8080)
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
        """The cloud knows the way to each site's edge, which answers its own site: only the router's rule is between."""
        dropped = {}
        for site, (router, edge) in self.lab.sites.items():
            self.lab.towards(site)
            check(edge.do("hostname", "-I").split()[0] == EDGE, f"{edge.name} has another address")
            answer = router.do("curl", "-sk", "--max-time", "5", f"https://{EDGE}:10250/healthz")
            check(answer, f"{edge.name} does not answer its own router")
            code, _, err = self.cloud.run("curl", "-sk", "--max-time", "2", f"https://{EDGE}:10250/healthz")
            check(code == 28, f"a direct dial to {edge.name} should time out, and ended with {code}: {err}")
            dropped[site] = int(router.do("iptables", "-nvxL", "FORWARD").splitlines()[2].split()[0])
            check(dropped[site] > 0, f"the router of site {site} has dropped nothing")
        return f"timed out; packets dropped at the routers: {dropped}; both edges are {EDGE}"

    def nothing_works_without_a_tunnel(self, kubectl):
        """Though kube-apiserver can look the node up, and would dial it."""
        self.cloud.sh(f"cp /etc/hosts /run/hosts; echo {EDGE} edge-a >> /etc/hosts")
        try:
            _, out, err = kubectl.run("exec", "on-edge-a", "--", "hostname", seconds=90)
        finally:
            self.cloud.sh("cat /run/hosts > /etc/hosts")
        check(not out, "kubectl exec worked without a tunnel: the rig proves nothing")
        last = err.strip().splitlines()[-1]
        check("i/o timeout" in last, last)
        return last

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
            script = f"curl -sS --fail --max-time 30 http://127.0.0.1:{port}/5m | sha256sum"
            return self.cloud.sh(script).split()[0]
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
        events = self.audited()
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
        self.cluster.apply(pod("chatty", "edge-a", ["yes", "as fast as it can, as fast as it can, as fast as it can"]))
        self.cluster.kubectl("wait", "--for=condition=Ready", "pod/chatty", "--timeout=30s")
        readers, stop = [], threading.Event()
        try:
            without = self.exec_times(kubectl, 20)
            readers = [kubectl.follow("logs", "-f", "chatty") for _ in range(3)]
            with ThreadPoolExecutor(3) as pool:
                slow = [pool.submit(self.read_slowly, reader, stop) for reader in readers]
                try:
                    until("the logs are held up by their readers", 60, self.agent_is_calm)
                    # What else this machine does can only add: logs in the way of exec would be so in every round.
                    times = min((self.exec_times(kubectl, 20) for _ in range(3)), key=lambda times: sorted(times)[-2])
                finally:
                    stop.set()
                read = [task.result() for task in slow]
        finally:
            for reader in readers:
                reader.end(signal.SIGKILL)
            self.cluster.kubectl("delete", "pod", "chatty", "--grace-period=0", "--force", seconds=60)
        check(min(read) > 100 * 1024, f"the readers got no more than {read} bytes")
        shown, alone = (", ".join(f"{t * 1000:.0f}" for t in sorted(some)) for some in (times, without))
        check(sorted(times)[-2] < 0.5, f"exec took {shown} ms; without the readers {alone} ms")
        median, alone = (statistics.median(some) * 1000 for some in (times, without))
        return f"median {median:.0f} ms, worst {max(times) * 1000:.0f} ms; without readers {alone:.0f} ms"

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
        streams = until("the streams have settled", 30, self.settled, 0)
        before = self.processes()
        opened = self.opened()
        seen = self.storm(kubectl, 150)
        opened = self.opened() - opened
        check(seen["log"] >= 60 and seen["exec"] >= 30, f"kube-apiserver saw {dict(seen)}: the storm was none")
        check(opened >= seen["exec"], f"{opened:.0f} streams were opened for {dict(seen)}")
        until(f"no more than {streams[0]:.0f} streams", 20, lambda: self.streams() <= streams[0])
        after = until("about as few open files as before", 20, lambda: self.no_more_files(before))
        for name in before:
            grown = after[name][1] - before[name][1]
            check(grown < 4, f"{name} has grown by {grown:.1f} MiB")
        check(max(self.exec_times(kubectl, 5)) < 2, "exec stalls after the storm")
        grown = ", ".join(f"{name} {before[name][0]} -> {after[name][0]} files, "
                          f"{before[name][1]:.1f} -> {after[name][1]:.1f} MiB" for name in list(before)[:2])
        return f"{dict(seen)}; {grown}"

    def opened(self):
        return self.tunnel.metric(self.edges["edge-a"], "edge", "tunnel_edge_streams_opened_total")

    def settled(self):
        """The number of streams, in a list, once it is the same a second later."""
        before = self.streams()
        time.sleep(1)
        return [before] if self.streams() == before else None

    def no_more_files(self, before):
        now = self.processes()
        for name in before:
            check(now[name][0] <= before[name][0] + FILES_OF_OTHERS,
                  f"{name}: {before[name][0]} -> {now[name][0]} open files")
        return now

    def storm(self, kubectl, count):
        """Two thirds `logs -f`, one third `exec`, each ended by an interrupt; and what kube-apiserver saw of them."""
        def one(number):
            command = ["exec", "on-edge-a", "--", "sleep", "60"] if number % 3 == 0 else ["logs", "-f", "on-edge-a"]
            running = kubectl.follow(*command)
            time.sleep(0.2 + 0.01 * (number % 40))
            running.end(signal.SIGINT)
        self.cloud.sh(f": > {AUDIT_LOG}")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, range(count)))
        return Counter(event["objectRef"]["subresource"] for event in self.audited())

    def audited(self):
        return [json.loads(line) for line in self.cloud.read(AUDIT_LOG).splitlines()]

    # 4: webhooks, and grants from the cluster

    def webhooks_by_service(self):
        self.serve_webhooks()
        for edge in self.edges:
            service = {"namespace": "default", "name": f"webhook-{edge}", "path": "/admit"}
            self.ask_webhook(edge, {"service": service})

    def webhooks_by_address(self):
        """A webhook by URL is `controlplane` traffic for kube-apiserver, which has a selection of its own."""
        self.serve_webhooks()
        for edge in self.edges:
            self.ask_webhook(edge, {"url": f"https://{self.webhook_address(edge)}:8443/admit"})

    def webhook_address(self, edge):
        return self.cluster.get("pod", f"webhook-{edge}")["status"]["podIP"]

    def encoded(self, path):
        return base64.b64encode(self.cloud.read(path).encode()).decode()

    @functools.cache
    def serve_webhooks(self):
        """A webhook in a pod of each node, behind a Service of its own."""
        for edge in self.edges:
            name = f"webhook-{edge}"
            # Its pod will have one of the node's first addresses.
            network = ipaddress.ip_network(self.cluster.get("node", edge)["spec"]["podCIDR"])
            addresses = [f"IP:{address}" for address in itertools.islice(network.hosts(), 60)]
            self.cluster.issue(name, f"/CN={name}", [f"DNS:{name}.default.svc", *addresses])
            metadata = {"name": name, "namespace": "default"}
            secret = {"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": metadata,
                      "data": {f"tls.{kind}": self.encoded(f"{PKI}/{name}.{kind}") for kind in ("crt", "key")}}
            service = {"apiVersion": "v1", "kind": "Service", "metadata": metadata,
                       "spec": {"selector": {"app": name}, "ports": [{"port": 443, "targetPort": 8443}]}}
            mount = {"volumeMounts": [{"name": "tls", "mountPath": "/etc/webhook"}]}
            self.cluster.apply(secret, service, pod(name, edge, ["/webhook"], container=mount,
                                                    volumes=[{"name": "tls", "secret": {"secretName": name}}]))
            self.cluster.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=60s", seconds=70)
        for edge in self.edges:
            until(f"webhook-{edge} listens", 20, lambda edge=edge: "200 OK" in self.connect(
                f"{self.webhook_address(edge)}:8443"))

    def ask_webhook(self, edge, where):
        """Configures a webhook for config maps with a label, makes some, and reads which node admitted them."""
        webhook = {"name": "asks.edge-tunnel.test", "sideEffects": "None", "admissionReviewVersions": ["v1"],
                   "failurePolicy": "Fail", "timeoutSeconds": 5,
                   "clientConfig": {**where, "caBundle": self.encoded(f"{PKI}/ca.crt")},
                   "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"],
                              "resources": ["configmaps"]}],
                   "objectSelector": {"matchLabels": {"ask": edge}}}
        configuration = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
                         "metadata": {"name": f"asks-{edge}"}, "webhooks": [webhook]}
        self.cluster.apply(configuration)
        try:
            # A new configuration is not in force at once, and nobody is asked until then. Once the webhook is asked,
            # a create that fails is a failure: nothing here tries again.
            deadline = time.monotonic() + 15
            while not (on := self.admitted_on(edge)):
                check(time.monotonic() < deadline, f"the webhook on {edge} was never asked")
            for _ in range(10):
                check(on == edge, f"the webhook on {edge} should have been asked, and {on} was")
                on = self.admitted_on(edge)
        finally:
            self.cluster.kubectl("delete", "mutatingwebhookconfiguration", f"asks-{edge}")

    def admitted_on(self, edge):
        metadata = {"name": f"asks-{edge}", "namespace": "default", "labels": {"ask": edge}}
        asked = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
        made = json.loads(self.cluster.kubectl("create", "-o", "json", "-f", "-", stdin=json.dumps(asked).encode()))
        self.cluster.kubectl("delete", "configmap", f"asks-{edge}")
        return made["metadata"].get("annotations", {}).get("edge-tunnel.test/admitted-on")

    def pods_and_services_by_proxy(self, kubectl):
        """kube-apiserver connects the pod itself, by its address."""
        self.serve_webhooks()
        for edge in self.edges:
            for what in (f"pods/https:webhook-{edge}:8443", f"services/https:webhook-{edge}:443"):
                answer = kubectl.do("get", "--raw", f"/api/v1/namespaces/default/{what}/proxy/node")
                check(answer.strip() == edge, f"{what} was answered by {answer!r}")

    def least_privilege(self, kubectl):
        """All that the gateway may do, but for what every account may: ask about itself, and read health and versions."""
        user = "--as=system:serviceaccount:edge-tunnel:gateway"
        for namespace in ("default", "edge-tunnel", "kube-system"):
            lines = kubectl.do("auth", "can-i", "--list", "--no-headers", "-n", namespace, user).splitlines()
            rights = [line.split(maxsplit=1) for line in lines if line[0] not in " ["]
            rights = {what: more.rpartition("[")[2].rstrip("]") for what, more in rights if "selfsubject" not in what}
            check(rights == {"nodes": "get list watch"}, f"in {namespace} the gateway may {rights}")
        known = self.tunnel.metric(self.cloud, "gateway", "tunnel_server_cluster_nodes")
        check(known == 2, f"the gateway knows {known} nodes")
        return "get, list and watch of nodes, and nothing else"

    def nodes_come_and_go(self):
        before = self.tunnel.metric(self.cloud, "gateway", "tunnel_server_cluster_nodes")
        spec = {"podCIDR": "10.245.9.0/24", "podCIDRs": ["10.245.9.0/24"]}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "edge-z"}, "spec": spec}
        self.cluster.apply(node)
        try:
            until("the new node is known", 10, lambda: "node edge-z has no link" in self.connect("10.245.9.7:8443"))
        finally:
            self.cluster.kubectl("delete", "node", "edge-z")
        until("the deleted node is forgotten", 10, lambda: "404" in self.connect("10.245.9.7:8443"))
        after = self.tunnel.metric(self.cloud, "gateway", "tunnel_server_cluster_nodes")
        check(after == before, f"the gateway knew {before} nodes, and knows {after}")

    def connect(self, target):
        """Asks the gateway itself, with kube-apiserver's certificate. What curl says of the answer."""
        pki = "/etc/edge-tunnel/pki/control-plane"
        proxy = ["--proxy", "https://127.0.0.1:8131", "--proxy-cacert", f"{pki}/ca.crt",
                 "--proxy-cert", f"{pki}/client.crt", "--proxy-key", f"{pki}/client.key"]
        _, out, err = self.cloud.run("curl", "-sSvk", "--max-time", "10", *proxy, f"https://{target}/")
        return out + err

    def without_an_apiserver(self):
        """What the gateway knew stays, by name and by pod address."""
        self.serve_webhooks()
        addresses = {edge: self.webhook_address(edge) for edge in self.edges}
        self.cluster.stop_apiserver()
        try:
            for edge, address in addresses.items():
                for target in (f"{address}:8443", f"{edge}:10250"):
                    answer = self.connect(target)
                    check("200 OK" in answer, f"{target}: {answer[-400:]}")
            check(self.tunnel.ready(self.cloud, "gateway"), "the gateway is not ready")
        finally:
            self.cluster.restart_apiserver()
        in_sync = "tunnel_server_cluster_in_sync"
        until("the gateway watches again", 60, lambda: self.tunnel.metric(self.cloud, "gateway", in_sync) == 1)

    # 5: the right node

    def shared_address_is_refused(self):
        """Both nodes have it, so nobody can know which one is meant."""
        answer = self.connect(f"{EDGE}:10250")
        check("502" in answer and "edge-a" in answer and "edge-b" in answer, answer[-400:])
        return next(line for line in answer.splitlines() if "502" in line).strip("< \r")

    def never_the_wrong_node(self, kubectl):
        def ask(number):
            edge = list(self.edges)[number % 2]
            if number % 3 == 0:
                pods = json.loads(kubectl.do("get", "--raw", f"/api/v1/nodes/{edge}/proxy/pods"))["items"]
                names = {item["metadata"]["name"] for item in pods}
                return {name for name in names if name.startswith("on-")} == {f"on-{edge}"}
            return self.answers(kubectl, edge)
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, range(90)))
        check(all(answers), f"{answers.count(False)} of {len(answers)} came from the wrong node")
        return f"{len(answers)} answers, all from the node that was asked"

    def a_node_that_goes_away(self, kubectl):
        router, _ = self.lab.sites["b"]
        with (kubectl.follow("logs", "-f", "--tail=0", "on-edge-a") as other,
              kubectl.follow("logs", "-f", "--tail=0", "on-edge-b") as gone):
            other.line(5), gone.line(5)
            router.do("iptables", "-I", "FORWARD", "-j", "DROP")
            cut = time.monotonic()
            try:
                def noticed():
                    # The other node's log goes on all the while.
                    other.line(1.5)
                    return not self.tunnel.linked("edge-b")
                until("the gateway has noticed", 3 * HEARTBEAT, noticed, 0)
                after = time.monotonic() - cut
                check(after <= 2 * HEARTBEAT + 1, f"noticed only after {after:.1f} s")
                words = self.refused(kubectl, "edge-b")
                ended = gone.wait(10)
                other.line(1.5)
            finally:
                router.do("iptables", "-D", "FORWARD", "-j", "DROP")
        until("edge-b is back", 60, lambda: self.answers(kubectl, "edge-b"), 1)
        return f"noticed after {after:.1f} s; logs -f ended with {ended[0]}; then {words[words.find('proxy error'):]}"

    @staticmethod
    def refused(kubectl, edge):
        code, out, err = kubectl.run("exec", f"on-{edge}", "--", "hostname", seconds=60)
        check(not out, "it still answers")
        check(err.strip(), f"kubectl ended with {code}, and without a word")
        last = err.strip().splitlines()[-1]
        check(f"node {edge} has no link" in last and "last seen" in last, f"the error does not say why: {last}")
        return last

    # 6: rotation

    def certificates(self):
        """Of each edge's kubelet: its serial number, and when it ends."""
        found = {}
        for name, edge in self.edges.items():
            current = "/var/lib/kubelet/pki/kubelet-client-current.pem"
            text = edge.do("openssl", "x509", "-noout", "-serial", "-enddate", "-in", current)
            serial, end = (line.partition("=")[2] for line in text.splitlines())
            found[name] = (serial, calendar.timegm(time.strptime(end, "%b %d %H:%M:%S %Y GMT")))
        return found

    def agents_follow_rotation(self, kubectl):
        """While nothing else makes an agent link anew: a new link before the old certificate ends, under a running log."""
        old, log = self.certificates(), len(self.tunnel.gateway.text())
        with kubectl.follow("logs", "-f", "--tail=0", "on-edge-a") as running:
            seen = {}

            def renewed():
                # All edges at once: one's old certificate may end before another has its new one.
                running.line(2)
                text, now = self.tunnel.gateway.text(log), self.certificates()
                for edge, (serial, _) in old.items():
                    if now[edge][0] != serial and f"link up node={edge} " in text:
                        seen.setdefault(edge, time.time())
                return len(seen) == len(old)
            until("each edge has a new certificate and a new link", 260, renewed)
            for edge, (_, ends) in old.items():
                check(seen[edge] < ends, f"the new link of {edge} came only when its old certificate had ended")
            check("expired" not in self.tunnel.gateway.text(log), "the gateway ended a link for its certificate")
            # The old certificates are over, and what ran over their links goes on.
            deadline = uptime() + max(0, max(ends for _, ends in old.values()) - time.time()) + 5
            while float(running.line(2).split()[1]) < deadline:
                pass
        return self.never_the_wrong_node(kubectl)

    # 7: restarts

    def gateway_restarts(self, kubectl):
        """Counted from the start of the new process; the first exec that is tried must work within five seconds."""
        self.tunnel.stop_gateway()
        _, out, _ = kubectl.run("exec", "on-edge-a", "--", "hostname", seconds=60)
        check(not out, "exec worked without a gateway")
        back = time.monotonic()
        self.tunnel.start_gateway()
        until("exec works again", 30, lambda: self.answers(kubectl, "edge-a"), 0.1)
        took = time.monotonic() - back
        check(took < 5, f"exec worked only {took:.1f} s after the gateway's return")
        return f"exec worked {took:.1f} s after the gateway's start"

    @staticmethod
    def answers(kubectl, edge):
        """By what it prints: over WebSocket kubectl's exit code is 0 now and then though kube-apiserver reached nobody."""
        return kubectl.do("exec", f"on-{edge}", "--", "hostname").strip() == f"on-{edge}"

    def killed_amid_download(self, kubectl):
        """kubectl either fails, or what it copied is whole."""
        kubectl.do("exec", "on-edge-a", "--", "dd", "if=/dev/urandom", "of=/data/big", "bs=1M", "count=200")
        wanted = kubectl.do("exec", "on-edge-a", "--", "sha256sum", "/data/big").split()[0]
        here = self.lab.folder / "download"

        def copied():
            return here.stat().st_size if here.exists() else 0
        outcomes = []
        for point in (10 * MiB, 40 * MiB, 80 * MiB):
            here.unlink(missing_ok=True)
            with kubectl.follow("cp", "on-edge-a:/data/big", str(here)) as running:
                until(f"{point // MiB} MiB are copied", 60, lambda point=point: copied() >= point, 0.005)
                code, err = self.kill_gateway(running)
            outcomes.append(f"{'failed' if code else 'whole'} at {copied() // MiB} MiB")
            if code == 0:
                whole = hashlib.sha256(here.read_bytes()).hexdigest() == wanted
                check(whole, f"kubectl reported success for {copied()} bytes of {200 * MiB}")
            check(code == 0 or err.strip(), "kubectl failed without a word")
        here.unlink(missing_ok=True)
        kubectl.do("exec", "on-edge-a", "--", "rm", "/data/big")
        check(any(outcome.startswith("failed") for outcome in outcomes), f"never killed in the middle: {outcomes}")
        return ", ".join(outcomes)

    def kill_gateway(self, running):
        """While a command runs. Its exit code and what it said; the gateway is back then."""
        self.tunnel.stop_gateway(signal.SIGKILL)
        ended = running.wait(60)
        self.tunnel.start_gateway()
        self.tunnel.wait_for_links()
        return ended

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
