"""Three gateways as docs/kubernetes.md and deploy/kubernetes set them up, in place of the one that was there before.

All nodes of the rig are at the edge, where no gateway may be: the Deployment's pods rightly wait for others. So each
gateway is a process on a host of its own, with the configuration, the Secrets, the user and the rights of the pod that it
stands for; names of /etc/hosts stand for the headless Service, and haproxy for the two other Services. The agents are the
DaemonSet's real pods.
"""

import base64
import functools
import json
import signal
import subprocess
from pathlib import Path

from cluster import image
from lab import CLOUD, check, until

NAMES = ("gateway-1", "gateway-2", "gateway-3")
DOMAINS = ("edge", "control-plane", "peer")
PROGRAM, CONFIG = "/usr/local/bin/tunnel-server", "/etc/edge-tunnel/gateway.yaml"
# The pod's user and group.
USER = ["setpriv", "--reuid=65532", "--regid=65532", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
# What only a pod has, and a drain that does not take the rig's time: haproxy notices within two seconds.
INSTEAD = ["--kubernetes-kubeconfig=/etc/edge-tunnel/gateway.conf", "--drain-delay=4s", "--drain-timeout=6s"]


class Gateways:
    """The gateways, each on its host, by name."""

    def __init__(self, lab, cluster, tunnel):
        self.lab, self.cluster, self.tunnel, self.cloud = lab, cluster, tunnel, lab.cloud
        self.hosts = {}

    # Set up

    def make_namespace(self):
        """Without it kube-apiserver does not even try what shall be in it. The gateways' own is there since step 2."""
        self.cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "edge-tunnel-edges"}})

    def prepare(self):
        """The guide's section, once everything else of the guide is there, up to what would be started."""
        # At once: its orderly end, which other cases have, waits half a minute for what kube-apiserver keeps open.
        self.tunnel.stop_gateway(signal.SIGKILL)
        for edge in self.lab.edges:
            edge.daemons["tunnel-edge"].stop()
        self.make_hosts()
        self.tunnel.follow(self.cloud, self.tunnel.guide.text("cloud", "gateways"))
        for host in self.hosts.values():
            self.fill(host)

    def begin(self):
        """The rest of it."""
        for host in self.hosts.values():
            self.start(host)
        for host in self.hosts.values():
            self.wait_for(host)
        self.start_balancer()
        self.bring_agent_image()
        self.tunnel.follow(self.cloud, self.tunnel.guide.text("cloud", "agents"))
        self.cluster.restart_apiserver()
        self.wait_for_links()

    def make_hosts(self):
        addresses = {name: f"10.77.0.{20 + number}" for number, name in enumerate(NAMES, 1)}
        lines = [f"{address} {name}.example gateway-peers.edge-tunnel.svc" for name, address in addresses.items()]
        for name, address in addresses.items():
            self.hosts[name] = self.lab.another(name, address)
        for host in (self.cloud, *self.hosts.values()):
            host.sh("cat >> /etc/hosts", stdin="".join(f"{line}\n" for line in lines).encode())

    def fill(self, host):
        """What a pod finds: the ConfigMap, and the Secrets' files, which its group may read."""
        host.do("install", "-m", "0755", Path(self.tunnel.checkout, "target/release/tunnel-server"), PROGRAM)
        host.write(CONFIG, self.configuration("gateway"))
        for domain in DOMAINS:
            secret = self.cluster.get("secret", "-n", "edge-tunnel", f"gateway-{domain}")
            for name, content in secret["data"].items():
                self.hand_over(host, f"/etc/edge-tunnel/pki/{domain}/{name}", base64.b64decode(content).decode())
        self.hand_over(host, "/etc/edge-tunnel/gateway.conf", self.cloud.read("/etc/edge-tunnel/gateway.conf"))

    @staticmethod
    def hand_over(host, path, text):
        host.write(path, text, 0o440)
        host.do("chgrp", "65532", path)

    def configuration(self, name):
        """The file in a ConfigMap, whose name ends with its content's hash."""
        maps = [item for item in self.manifests(name) if item["kind"] == "ConfigMap"]
        check(len(maps) == 1, f"deploy/kubernetes/{name} has {len(maps)} ConfigMaps")
        return maps[0]["data"][f"{name}.yaml"]

    @functools.cache
    def manifests(self, name):
        """All objects of a folder of deploy/kubernetes, as kube-apiserver would have them. It must not even warn."""
        folder = f"{self.tunnel.checkout}/deploy/kubernetes/{name}"
        code, out, err = self.cloud.run(f"{self.cluster.binaries}/kubectl", "--kubeconfig=/etc/kubernetes/admin.conf",
                                        "apply", "--dry-run=server", "-o", "json", "-k", folder)
        check(code == 0 and not err.strip(), f"{folder}: exit code {code}: {err.strip()[-800:]}")
        return json.loads(out)["items"]

    def pod_of(self, name):
        """The only pod of a folder, as its Deployment or DaemonSet describes it."""
        return next(item["spec"]["template"]["spec"] for item in self.manifests(name) if "template" in item.get("spec", {}))

    def start_balancer(self):
        """haproxy, also at the address that the cluster has given to the gateways' Service."""
        service = self.cluster.get("service", "-n", "edge-tunnel", "gateway-ingress")
        self.cloud.sh(f"ip address add {service['spec']['clusterIP']}/32 dev lo")
        self.cloud.write("/etc/haproxy/haproxy.cfg", self.tunnel.guide.text("haproxy"))
        self.cloud.start("haproxy", "haproxy", "-db", "-f", "/etc/haproxy/haproxy.cfg")
        until("haproxy listens", 10, lambda: self.cloud.sh(f"nc -z {CLOUD} 8443; echo yes"))

    def bring_agent_image(self):
        """As deploy/Containerfile makes it, but for the C library, which has to be there as files."""
        program = f"{self.tunnel.checkout}/target/release/tunnel-edge"
        linked = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout.split()
        files = {"usr/local/bin/tunnel-edge": program, **{path[1:]: path for path in linked if path.startswith("/")}}
        name = self.pod_of("edge")["containers"][0]["image"]
        archive = image(name, ["/usr/local/bin/tunnel-edge"], files, [])
        for edge in self.lab.edges:
            edge.do("ctr", "-n", "k8s.io", "images", "import", "-", stdin=archive)

    # Their life

    def start(self, host):
        host.start("tunnel-server", *USER, "--", PROGRAM, "run", "--config", CONFIG, *INSTEAD,
                   env={"TUNNEL_SERVER_GATEWAY_ID": host.name})

    def wait_for(self, host):
        daemon = host.daemons["tunnel-server"]

        def ready():
            check(daemon.alive(), f"{host.name} has ended: {daemon.tail(3)}")
            return self.tunnel.ready(host, "gateway")
        until(f"{host.name}'s readiness", 20, ready, 0.05)

    def restart(self, host):
        """In order, as a rolling update does it."""
        code = host.daemons["tunnel-server"].stop(signal.SIGTERM, 40)
        check(code == 0, f"{host.name} has ended with {code}: {host.daemons['tunnel-server'].tail(3)}")
        self.start(host)
        self.wait_for(host)

    def kill(self, host):
        host.daemons["tunnel-server"].stop(signal.SIGKILL)

    def wait_for_links(self, seconds=40):
        """Each agent has links to two gateways."""
        for edge in self.lab.edges:
            until(f"{edge.name} has two gateways", seconds,
                  lambda edge=edge: self.tunnel.metric(edge, "edge", "tunnel_edge_gateways_linked") >= 2)

    def carriers(self):
        """The gateways over which there are streams now."""
        return {name for name, host in self.hosts.items() if self.streams(host)}

    def streams(self, host):
        """Also those that are handed on for another gateway."""
        names = ("tunnel_server_streams_active", "tunnel_server_forwarded_active")
        return sum(self.tunnel.metric(host, "gateway", name) for name in names)
