"""The rig's course: hosts, cluster, the guide's commands, the cases. Called by `run`, within namespaces of its own."""

import argparse
import glob
import re
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cases import Cases, MiB  # noqa: E402
from client import Kubectl  # noqa: E402
from cluster import Cluster  # noqa: E402
from gateways import Gateways  # noqa: E402
from guide import Guide  # noqa: E402
from lab import Lab  # noqa: E402
from report import Report  # noqa: E402
from several import Several  # noqa: E402
from tunnel import Tunnel  # noqa: E402


# For everything: a run that hangs somewhere ends with its table.
DEADLINE = 40 * 60


def arguments():
    parser = argparse.ArgumentParser()
    for name in ("folder", "logs", "binaries", "checkout", "cgroup"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--kubectls", required=True, help="folder with kubectl.MAJOR.MINOR programs")
    parser.add_argument("--only")
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--gateways", action="store_true", help="only the cases with several gateways, all of them")
    return parser.parse_args()


def kubectls(cloud, folder):
    """The oldest and the newest kubectl of the machine, by version."""
    found = {}
    for program in glob.glob(f"{folder}/kubectl.*"):
        if version := re.search(r"kubectl\.(\d+)\.(\d+)$", program):
            found[tuple(map(int, version.groups()))] = program
    oldest, newest = min(found), max(found)

    def client(version, websockets):
        return Kubectl(cloud, found[version], ".".join(map(str, version)), websockets)
    return [client(oldest, False), client(newest, False), client(newest, True)]


def main():
    options = arguments()
    # A background process of a shell ignores interrupts, and would hand that on to every kubectl.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(DEADLINE)
    report = Report(options.only)
    begun = time.monotonic()

    def say(text):
        print(f"[{time.monotonic() - begun:6.1f} s] {text}", flush=True)

    lab = Lab(options.folder, options.logs)
    try:
        run(lab, options, report, say)
    except Exception as failure:
        for host in lab.hosts:
            for daemon in host.daemons.values():
                ended = "" if daemon.alive() else " (ended)"
                print(f"\n--- {host.name} {daemon.name}{ended}\n{daemon.tail()}", file=sys.stderr)
        report.broken_off(failure)
    finally:
        lab.stop()
    return report.finish()


def out_of_time(*_):
    raise TimeoutError(f"not done within {DEADLINE // 60} minutes")


def run(lab, options, report, say):
    cluster = Cluster(lab, options.binaries, options.cgroup)
    guide = Guide(Path(options.checkout, "docs/kubernetes.md").read_text())
    tunnel = Tunnel(lab, cluster, guide, options.checkout)
    cases = Cases(lab, cluster, tunnel)
    oldest, spdy, websocket = clients = kubectls(lab.cloud, options.kubectls)
    if oldest.version == spdy.version:
        report.skip(2, "the oldest kubectl", f"there is only {spdy.version} on this machine")
        clients = [spdy, websocket]

    cluster.start_control_plane(certificate_lifetime="1h" if options.slow else "240s")
    cluster.let_nodes_in()
    for edge in lab.edges:
        cluster.start_node(edge)
    cluster.wait_for_nodes()
    cases.prepare()
    say(f"{len(lab.edges)} nodes are ready")
    case = report.case
    gateways = Gateways(lab, cluster, tunnel)
    several = Several(lab, cluster, gateways)
    if not options.slow and not options.gateways:
        case(0, "a direct dial from cloud to edge fails", cases.edges_cannot_be_dialled)
        case(0, "without a tunnel, kubectl exec fails", cases.nothing_works_without_a_tunnel, websocket)

    tunnel.set_up()
    tunnel.wait_for_links()
    say("the tunnel is up")
    if options.slow:
        case(2, "logs -f is alive after five idle minutes", cases.idle_logs, websocket, 300)
        return
    if options.gateways:
        several_gateways(case, several, say)
        for kubectl in clients:
            through_the_balancer(case, cases, kubectl, 64 * MiB)
        case(8, "logs -f goes on while other gateways restart", several.logs_outlive_other_gateways, websocket)
        gateways_come_and_go(case, several, clients, list(gateways.hosts))
        return
    for kubectl in clients:
        size = 8 if kubectl is spdy and oldest in clients else 200
        kubectl_cases(case, cases, kubectl, "TCP with TLS", size * MiB)
    case(2, "node proxy: healthz and metrics/resource of both nodes", cases.node_proxy, websocket)
    case(3, "three chatty logs -f, held up by readers: 19 of 20 exec below 500 ms",
         cases.chatty_logs_leave_exec_alone, websocket)
    case(3, "100 logs -f and 50 exec, interrupted, leave nothing behind", cases.interrupts_leave_nothing, websocket)
    case(4, "admission webhooks in pods, by Service", cases.webhooks_by_service)
    case(4, "the pods of both nodes, by kube-apiserver's proxy", cases.pods_and_services_by_proxy, websocket)
    case(4, "the gateway's rights in the cluster", cases.least_privilege, websocket)
    case(4, "nodes that are added and deleted", cases.nodes_come_and_go)
    case(4, "kube-apiserver gone: what was known stays", cases.without_an_apiserver)
    case(5, "both nodes at once: never the wrong one", cases.never_the_wrong_node, websocket)
    case(5, "the address that both nodes have is refused", cases.shared_address_is_refused)
    case(5, "a node that goes away: noticed within two heartbeats", cases.a_node_that_goes_away, websocket)
    case(6, "agents follow their kubelets' rotating certificates", cases.agents_follow_rotation, websocket)
    case(7, "the gateway restarts", cases.gateway_restarts, websocket)
    case(7, "the gateway is killed amid cp from the node", cases.killed_amid_download, websocket)
    report.skip(7, "the gateway is killed amid cp to the node", "kubectl takes the end of its connection for success, "
                "with or without a tunnel (client-go, remotecommand/errorstream.go)")
    case(7, "the gateway is killed amid cp from the node, SPDY", cases.killed_amid_download, spdy)

    tunnel.switch_to_unix_socket()
    tunnel.send_control_plane_traffic_too()
    cluster.restart_apiserver()
    tunnel.wait_for_links()
    say("kube-apiserver uses the Unix socket")
    for kubectl in clients:
        kubectl_cases(case, cases, kubectl, "Unix socket", 8 * MiB)
    case(5, "both nodes at once: never the wrong one, Unix socket", cases.never_the_wrong_node, websocket)
    case(4, "admission webhooks in pods, by address", cases.webhooks_by_address)
    case(7, "the gateway restarts, Unix socket", cases.gateway_restarts, websocket)
    case(7, "the gateway is killed amid cp from the node, Unix socket", cases.killed_amid_download, websocket)

    tunnel.switch_back_to_tcp()
    several_gateways(case, several, say)
    gateways_come_and_go(case, several, [websocket], ["gateway-2"])


def several_gateways(case, several, say):
    """Sets them up; what is deployed for that."""
    several.gateways.make_namespace()
    case(8, "the manifests are accepted by kube-apiserver", several.manifests_are_accepted)
    several.gateways.prepare()
    case(8, "the ConfigMaps' configurations are good", several.configurations_are_good)
    several.gateways.begin()
    say("three gateways are up, and the agents are pods")
    case(8, "the pods have the rights that they need, and no more", several.pods_are_as_they_should_be)


def gateways_come_and_go(case, several, clients, killed):
    for kubectl in clients:
        case(8, f"a gateway is killed under exec, {kubectl}", several.next_exec_works, kubectl, killed)
        case(8, f"a rolling restart of all gateways under exec, {kubectl}", several.rolling_restart, kubectl)


def through_the_balancer(case, cases, kubectl, size):
    for name, test, *more in [
        ("exec: output, errors, exit code, both nodes", cases.exec_runs_and_exits),
        ("logs -f: lines within a second", cases.logs_follow),
        ("port-forward: parallel connections", cases.forward_carries),
        ("cp: both ways, same sums", cases.cp_both_ways, size),
        ("both nodes at once: never the wrong one", cases.never_the_wrong_node),
    ]:
        case(8, f"three gateways, {kubectl}: {name}", test, kubectl, *more)


def kubectl_cases(case, cases, kubectl, ingress, size):
    for name, test, *more in [
        ("uses that protocol", cases.uses_its_protocol),
        ("exec: output, errors, exit code, both nodes", cases.exec_runs_and_exits),
        ("exec: 3 MiB of stdin", cases.exec_takes_stdin),
        ("exec -it: terminal, resize, exit code", cases.exec_in_a_terminal),
        ("attach", cases.attach_talks),
        ("logs", cases.logs_are_shown),
        ("logs -f: lines within a second", cases.logs_follow),
        ("port-forward: parallel connections", cases.forward_carries),
        ("cp: both ways, same sums", cases.cp_both_ways, size),
    ]:
        case(1 if ingress == "Unix socket" else 2, f"{ingress}, {kubectl}: {name}", test, kubectl, *more)


sys.exit(main())
