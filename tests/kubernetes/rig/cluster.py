"""A real Kubernetes on the rig's hosts: etcd, the control plane, and on each edge containerd and a kubelet."""

import base64
import hashlib
import io
import json
import platform
import signal
import tarfile

from lab import CLOUD, EDGE, check, until

SERVER = f"https://{CLOUD}:6443"
PKI = "/etc/kubernetes/pki"
BOOTSTRAP_TOKEN = "edge00.0123456789abcdef"
IMAGE, PAUSE = "edge-tunnel.test/busybox:1", "edge-tunnel.test/pause:1"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def image(name, entrypoint, files, links):
    """A container image of one layer, as the archive that `docker save` makes and `ctr images import` takes."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for folder in ("bin", "etc", "tmp", "data"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            tar.addfile(entry)
        for path, source in files.items():
            content = open(source, "rb").read()
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
        for path in links:
            entry = tarfile.TarInfo(path)
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = json.dumps({
        "architecture": ARCHITECTURES[platform.machine()], "os": "linux",
        "config": {"Entrypoint": entrypoint, "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path, content in (("manifest.json", manifest), ("config.json", config), ("layer.tar", layer.getvalue())):
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


class Cluster:
    """The control plane on `cloud`, and a node on each edge."""

    def __init__(self, lab, binaries, cgroup):
        self.lab, self.cloud, self.binaries, self.cgroup = lab, lab.cloud, binaries, cgroup
        self.apiserver_flags = ()

    # Certificates

    def make_authority(self):
        self.cloud.sh(f"""
            mkdir -p {PKI} && cd {PKI}
            openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=kubernetes \
                -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign,digitalSignature \
                -keyout ca.key -out ca.crt 2> /dev/null
            openssl genrsa -out sa.key 2048 2> /dev/null
            openssl rsa -in sa.key -pubout -out sa.pub 2> /dev/null""")

    def issue(self, name, subject, names=()):
        """A certificate of the cluster's CA, for servers and clients."""
        extensions = ["extendedKeyUsage=serverAuth,clientAuth"]
        if names:
            extensions.append(f"subjectAltName={','.join(names)}")
        self.cloud.write(f"{PKI}/{name}.ext", "\n".join(extensions))
        self.cloud.sh(f"""
            cd {PKI}
            openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj '{subject}' \
                -keyout {name}.key -out {name}.csr 2> /dev/null
            openssl x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile {name}.ext \
                -out {name}.crt 2> /dev/null
            rm {name}.csr {name}.ext""")

    def kubeconfig(self, credentials):
        """A kubeconfig for somebody with these credentials, in JSON, which is YAML."""
        authority = base64.b64encode(self.cloud.read(f"{PKI}/ca.crt").encode()).decode()
        return json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "rig",
            "clusters": [{"name": "rig", "cluster": {"server": SERVER, "certificate-authority-data": authority}}],
            "users": [{"name": "rig", "user": credentials}],
            "contexts": [{"name": "rig", "context": {"cluster": "rig", "user": "rig"}}],
        })

    def client(self, name, subject):
        """A kubeconfig with a client certificate, beside those that kubeadm makes."""
        self.issue(name, subject)
        self.cloud.write(f"/etc/kubernetes/{name}.conf", self.kubeconfig({
            "client-certificate": f"{PKI}/{name}.crt", "client-key": f"{PKI}/{name}.key"}), 0o600)

    # Control plane

    def start_control_plane(self, certificate_lifetime):
        """`certificate_lifetime`: of the kubelets' client certificates; a short one is rotated several times in one run."""
        self.make_authority()
        self.issue("apiserver", "/CN=kube-apiserver", ["DNS:localhost", "DNS:kubernetes", "DNS:kubernetes.default.svc",
                                                       f"IP:{CLOUD}", "IP:127.0.0.1", "IP:10.96.0.1"])
        self.issue("apiserver-kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client")
        self.client("admin", "/O=system:masters/CN=admin")
        self.client("controller-manager", "/CN=system:kube-controller-manager")
        self.client("scheduler", "/CN=system:kube-scheduler")
        self.cloud.start("etcd", "etcd", "--data-dir=/var/lib/etcd", "--listen-client-urls=http://127.0.0.1:2379",
                         "--advertise-client-urls=http://127.0.0.1:2379", "--listen-peer-urls=http://127.0.0.1:2380",
                         "--unsafe-no-fsync")
        self.cloud.write("/etc/kubernetes/audit.yaml", json.dumps(AUDIT))
        self.start_apiserver()
        self.cloud.start("controller-manager", f"{self.binaries}/kube-controller-manager",
                         "--kubeconfig=/etc/kubernetes/controller-manager.conf", "--leader-elect=false",
                         "--use-service-account-credentials", f"--service-account-private-key-file={PKI}/sa.key",
                         f"--root-ca-file={PKI}/ca.crt", f"--cluster-signing-cert-file={PKI}/ca.crt",
                         f"--cluster-signing-key-file={PKI}/ca.key",
                         f"--cluster-signing-duration={certificate_lifetime}",
                         "--allocate-node-cidrs", "--cluster-cidr=10.244.0.0/16", "--service-cluster-ip-range=10.96.0.0/16",
                         "--node-monitor-grace-period=40s")
        self.cloud.start("scheduler", f"{self.binaries}/kube-scheduler", "--kubeconfig=/etc/kubernetes/scheduler.conf",
                         "--leader-elect=false")

    def restart_apiserver(self, *flags):
        """With the given flags from now on, if there are any; or just as before."""
        self.apiserver_flags = flags or self.apiserver_flags
        if self.cloud.daemons["apiserver"].alive():
            self.stop_apiserver()
        self.start_apiserver()

    def stop_apiserver(self):
        """Abruptly: its orderly end waits a minute for the requests of others."""
        self.cloud.daemons["apiserver"].stop(signal.SIGKILL)

    def start_apiserver(self):
        self.cloud.start(
            "apiserver", f"{self.binaries}/kube-apiserver", "--etcd-servers=http://127.0.0.1:2379",
            f"--advertise-address={CLOUD}", "--secure-port=6443", f"--client-ca-file={PKI}/ca.crt",
            f"--tls-cert-file={PKI}/apiserver.crt", f"--tls-private-key-file={PKI}/apiserver.key",
            f"--service-account-key-file={PKI}/sa.pub", f"--service-account-signing-key-file={PKI}/sa.key",
            "--service-account-issuer=https://kubernetes.default.svc", "--service-cluster-ip-range=10.96.0.0/16",
            "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
            "--audit-policy-file=/etc/kubernetes/audit.yaml", f"--audit-log-path={AUDIT_LOG}",
            "--enable-bootstrap-token-auth", "--allow-privileged",
            f"--kubelet-client-certificate={PKI}/apiserver-kubelet-client.crt",
            f"--kubelet-client-key={PKI}/apiserver-kubelet-client.key",
            f"--kubelet-certificate-authority={PKI}/ca.crt", *self.apiserver_flags)
        until("kube-apiserver's readiness", 90, lambda: self.kubectl("get", "--raw", "/readyz") == "ok")

    def kubectl(self, *arguments, **options):
        return self.cloud.do(f"{self.binaries}/kubectl", "--kubeconfig=/etc/kubernetes/admin.conf", *arguments, **options)

    def apply(self, *objects):
        items = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        return self.kubectl("apply", "-f", "-", stdin=json.dumps(items).encode())

    def get(self, *what):
        return json.loads(self.kubectl("get", *what, "-o", "json"))

    # Nodes

    def let_nodes_in(self):
        """Bootstrap tokens and certificate requests, as kubeadm sets them up."""
        rbac = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding"}
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole"}
        signer = "system:certificates.k8s.io:certificatesigningrequests"
        grants = [("bootstrap", "system:node-bootstrapper", "system:bootstrappers"),
                  ("approve", f"{signer}:nodeclient", "system:bootstrappers"),
                  ("renew", f"{signer}:selfnodeclient", "system:nodes")]
        token_id, token_secret = BOOTSTRAP_TOKEN.split(".")
        self.apply(
            {"apiVersion": "v1", "kind": "Secret", "type": "bootstrap.kubernetes.io/token",
             "metadata": {"name": f"bootstrap-token-{token_id}", "namespace": "kube-system"},
             "stringData": {"token-id": token_id, "token-secret": token_secret, "usage-bootstrap-authentication": "true",
                            "usage-bootstrap-signing": "true"}},
            *({**rbac, "metadata": {"name": f"rig-{name}"}, "roleRef": {**role, "name": grant},
               "subjects": [{"apiGroup": role["apiGroup"], "kind": "Group", "name": group}]}
              for name, grant, group in grants))

    def start_node(self, edge):
        name = edge.name
        self.issue(f"kubelet-{name}", f"/O=system:nodes/CN=system:node:{name}", [f"DNS:{name}", f"IP:{EDGE}"])
        edge.write(f"{PKI}/ca.crt", self.cloud.read(f"{PKI}/ca.crt"))
        for kind in ("crt", "key"):
            edge.write(f"{PKI}/kubelet.{kind}", self.cloud.read(f"{PKI}/kubelet-{name}.{kind}"), 0o600)
        edge.write("/etc/kubernetes/bootstrap.conf", self.kubeconfig({"token": BOOTSTRAP_TOKEN}), 0o600)
        edge.write("/etc/containerd/config.toml", CONTAINERD)
        edge.write("/etc/cni/bridge.conflist.template", CNI)
        edge.write("/etc/kubernetes/kubelet.yaml", json.dumps(self.kubelet_configuration(name)))
        edge.sh(f"for hierarchy in /sys/fs/cgroup/*/; do mkdir -p $hierarchy/{self.cgroup}/{name}; done")
        edge.start("containerd", "containerd")
        until(f"containerd on {name}", 30, lambda: edge.do("ctr", "version"))
        for archive in self.images():
            edge.do("ctr", "-n", "k8s.io", "images", "import", "-", stdin=archive)
        edge.start("kubelet", f"{self.binaries}/kubelet", "--config=/etc/kubernetes/kubelet.yaml",
                   "--bootstrap-kubeconfig=/etc/kubernetes/bootstrap.conf", "--kubeconfig=/var/lib/kubelet/kubeconfig",
                   "--cert-dir=/var/lib/kubelet/pki", f"--node-ip={EDGE}", "-v=2")

    def images(self):
        applets = self.cloud.do("busybox", "--list").split()
        links = [f"bin/{applet}" for applet in applets if applet != "busybox"]
        busybox = {"bin/busybox": "/bin/busybox"}
        yield image(PAUSE, ["/bin/busybox", "sleep", "2147483647"], busybox, [])
        yield image(IMAGE, [], {**busybox, "webhook": f"{self.binaries}/webhook"}, links)

    def kubelet_configuration(self, name):
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True},
                               "x509": {"clientCAFile": f"{PKI}/ca.crt"}},
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "cgroupDriver": "cgroupfs", "cgroupRoot": f"/{self.cgroup}/{name}",
            "failCgroupV1": False, "failSwapOn": False,
            "enforceNodeAllocatable": [], "rotateCertificates": True, "resolvConf": "",
            "tlsCertFile": f"{PKI}/kubelet.crt", "tlsPrivateKeyFile": f"{PKI}/kubelet.key",
            "evictionHard": {"memory.available": "10Mi", "nodefs.available": "1%", "imagefs.available": "1%",
                             "nodefs.inodesFree": "1%"},
            "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
            "containerLogMaxSize": "50Mi",
        }

    def wait_for_nodes(self):
        def ready():
            nodes = {node["metadata"]["name"]: node for node in self.get("nodes")["items"]}
            for edge in self.lab.edges:
                check(edge.name in nodes, f"{edge.name} has not registered")
                conditions = {c["type"]: c for c in nodes[edge.name]["status"]["conditions"]}
                check(conditions["Ready"]["status"] == "True", f"{edge.name}: {conditions['Ready'].get('message')}")
            return nodes
        return until("both nodes ready", 120, ready, 1)


def pod(name, node, command, **more):
    """A pod on a certain node."""
    container = {"name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": command,
                 "env": [{"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
                 **more.pop("container", {})}
    return {"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
            "spec": {"nodeSelector": {"kubernetes.io/hostname": node}, "containers": [container],
                     "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": False, "tolerations": [{"operator": "Exists"}], **more}}


PODS = ["pods/exec", "pods/portforward", "pods/log"]
# Who streams, and how: a WebSocket begins with GET, SPDY with POST.
AUDIT = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived", "ResponseComplete"],
         "rules": [{"level": "Metadata", "resources": [{"group": "", "resources": PODS}]}, {"level": "None"}]}
AUDIT_LOG = "/var/log/audit.log"

CONTAINERD = f"""\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
    conf_template = "/etc/cni/bridge.conflist.template"
"""

# containerd fills in the node's pod CIDR, which the kubelet tells it.
CNI = """\
{
  "cniVersion": "0.4.0", "name": "pods",
  "plugins": [{
    "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
    "ipam": {"type": "host-local", "ranges": [[{"subnet": "{{.PodCIDR}}"}]], "routes": [{"dst": "0.0.0.0/0"}]}
  }]
}
"""
