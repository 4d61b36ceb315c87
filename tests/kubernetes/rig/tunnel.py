"""The tunnel on the rig's hosts, set up and started by the commands of docs/kubernetes.md."""

import signal

from lab import check, until

ADMIN = {"gateway": "http://127.0.0.1:8132", "edge": "http://127.0.0.1:8133"}
EGRESS = "/etc/kubernetes/egress.yaml"


class Tunnel:
    """The gateway on `cloud`, and an agent on each edge."""

    def __init__(self, lab, cluster, guide, checkout):
        self.lab, self.cloud, self.cluster, self.guide = lab, lab.cloud, cluster, guide
        self.checkout = checkout
        # With the length of its log when it began.
        self.gateway, self.begun = None, 0

    def follow(self, host, text):
        """Runs a block of the guide as a person would: line by line in one shell, ended by the first failure."""
        host.do("bash", "-euc", f"cd {self.checkout}\n{text}", seconds=120)

    def set_up(self):
        """The guide from its first block to its last, in its order. Blocks with a name of their own are for other times."""
        for words, text in self.guide.blocks:
            match words:
                case ("cloud",):
                    self.follow(self.cloud, text)
                case ("cloud", "runs"):
                    self.start_gateway()
                    self.bring_authority()
                case ("kube-apiserver",):
                    self.cluster.restart_apiserver(*text.split())
                case ("node",):
                    for edge in self.lab.edges:
                        self.follow(edge, text)
                case ("node", "runs"):
                    for edge in self.lab.edges:
                        self.start_agent(edge)
                case ("cloud", "tries"):
                    self.follow(self.cloud, text)

    def bring_authority(self):
        """What the guide leaves to a person."""
        for edge in self.lab.edges:
            edge.write("/etc/edge-tunnel/gateway-ca.crt", self.cloud.read("/etc/edge-tunnel/pki/edge/ca.crt"))

    def switch_to_unix_socket(self):
        self.cloud.sh(f"cp {EGRESS} {EGRESS}.tcp")
        self.stop_gateway()
        self.follow(self.cloud, self.guide.text("cloud", "unix"))
        self.start_gateway()

    def switch_back_to_tcp(self):
        """For kube-apiserver, when it starts anew."""
        self.cloud.sh(f"mv {EGRESS}.tcp {EGRESS}")

    def send_control_plane_traffic_too(self):
        self.follow(self.cloud, self.guide.text("cloud", "urls"))

    def linked(self, edge):
        """Whether the node has a link, by the gateway's log."""
        said = self.gateway.text(self.begun)
        return said.count(f"link up node={edge} ") > said.count(f"link down node={edge} ")

    def start_gateway(self):
        self.begun = len(self.gateway.text()) if self.gateway else 0
        self.gateway = self.cloud.start("tunnel-server", "sh", "-c", "exec " + self.guide.text("cloud", "runs"))
        until("the gateway's readiness", 20, lambda: self.ready(self.cloud, "gateway"), 0.05)
        check(self.gateway.alive(), f"the gateway has ended: {self.gateway.tail(3)}")

    def stop_gateway(self, number=signal.SIGTERM):
        self.gateway.stop(number, 60)

    def start_agent(self, edge):
        return edge.start("tunnel-edge", "sh", "-c", "exec " + self.guide.text("node", "runs"))

    def ready(self, host, kind):
        return "ok" in host.do("curl", "-sS", "--fail-with-body", f"{ADMIN[kind]}/readyz")

    def wait_for_links(self, seconds=20):
        for edge in self.lab.edges:
            until(f"a link of {edge.name}", seconds, lambda edge=edge: self.ready(edge, "edge"))

    def metrics(self, host, kind):
        """All samples, by name with labels."""
        samples = {}
        for line in host.do("curl", "-sS", "--fail", f"{ADMIN[kind]}/metrics").splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    def metric(self, host, kind, name):
        """The sum of a metric over all its labels."""
        samples = self.metrics(host, kind)
        found = [value for key, value in samples.items() if key.split("{")[0] == name]
        check(found, f"{host.name} has no metric {name}")
        return sum(found)
