"""The rig's course: hosts, cluster, the guide's commands, the cases. Called by `run`, within namespaces of its own."""

import argparse
import glob
import os
import re
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cases import Cases, MiB  # noqa: E402
from client import Kubectl  # noqa: E402
from cluster import Cluster  # noqa: E402
from guide import Guide  # noqa: E402
from lab import Lab, until  # noqa: E402
from report import Report, Skip  # noqa: E402
from tunnel import Tunnel  # noqa: E402


def arguments():
    parser = argparse.ArgumentParser(prog="tests/kubernetes/run")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--logs", required=True)
    parser.add_argument("--binaries", required=True)
    parser.add_argument("--checkout", required=True)
    parser.add_argument("--kubectls", required=True, help="folder with kubectl.MAJOR.MINOR programs")
    parser.add_argument("--cgroup", required=True, help="below which the pods' cgroups are made")
    parser.add_argument("--only", help="run just the cases whose point and name have this text")
    parser.add_argument("--slow", action="store_true", help="run the case that takes five idle minutes instead of the others")
    return parser.parse_args()


def kubectls(cloud, folder):
    """The oldest and the newest kubectl of the machine, by version."""
    found = {}
    for program in glob.glob(f"{folder}/kubectl.*"):
        if version := re.search(r"kubectl\.(\d+)\.(\d+)$", program):
            found[tuple(map(int, version.groups()))] = program
    oldest, newest = min(found), max(found)
    name = ".".join
    return [Kubectl(cloud, found[oldest], name(map(str, oldest)), False), Kubectl(cloud, found[newest], name(map(str, newest)), False),
            Kubectl(cloud, found[newest], name(map(str, newest)), True)]


def main():
    options = arguments()
    # A background process of a shell ignores interrupts, and would hand that on to every kubectl.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    report = Report(options.only)
    begun = time.monotonic()

    def say(text):
        print(f"[{time.monotonic() - begun:6.1f} s] {text}", flush=True)

    lab = Lab(options.folder, options.logs)
    try:
        run(lab, options, report, say)
    except Exception:
        for host in [lab.cloud, *lab.edges]:
            for daemon in host.daemons.values():
                print(f"\n--- {host.name} {daemon.name}{'' if daemon.alive() else ' (ended)'}\n{daemon.tail()}", file=sys.stderr)
        raise
    finally:
        lab.stop()
    return report.finish()


def run(lab, options, report, say):
    cluster = Cluster(lab, options.binaries, options.cgroup)
    guide = Guide(Path(options.checkout, "docs/kubernetes.md").read_text())
    tunnel = Tunnel(lab, cluster, guide, options.checkout)
    cases = Cases(lab, cluster, tunnel)
    oldest, spdy, websocket = clients = kubectls(lab.cloud, options.kubectls)

    cluster.start_control_plane(certificate_lifetime="1h" if options.slow else "240s")
    cluster.let_nodes_in()
    for edge in lab.edges:
        cluster.start_node(edge)
    cluster.wait_for_nodes()
    cases.prepare()
    say(f"{len(lab.edges)} nodes are ready")
    case = report.case
    if not options.slow:
        case(0, "a direct dial from cloud to edge fails", cases.edges_cannot_be_dialled)
        case(0, "without a tunnel, kubectl exec fails", cases.nothing_works_without_a_tunnel, websocket)

    tunnel.set_up()
    tunnel.wait_for_links()
    first = cases.certificates()
    say("the tunnel is up")
    if options.slow:
        case(2, "logs -f is alive after five idle minutes", cases.idle_logs, websocket, 300)
        return
    for kubectl in clients:
        kubectl_cases(case, cases, kubectl, "TCP with TLS", 200 * MiB if kubectl is not spdy else 8 * MiB)
    case(2, "node proxy: healthz and metrics/resource of both nodes", cases.node_proxy, websocket)
    case(3, "three chatty logs -f, read slowly: exec stays below 500 ms", cases.chatty_logs_leave_exec_alone, websocket)
    case(3, "100 interrupted logs -f leave nothing behind", cases.interrupts_leave_nothing, websocket)
    case(4, "admission webhooks in pods, by Service", cases.webhooks)
    case(4, "the pods of both nodes, by kube-apiserver's proxy", cases.pods_and_services_by_proxy, websocket)
    case(4, "the gateway's rights in the cluster", cases.least_privilege, websocket)
    case(4, "nodes that are added and deleted", cases.nodes_come_and_go)
    case(4, "kube-apiserver gone: what was known stays", cases.without_an_apiserver)
    case(5, "both nodes at once: never the wrong one", cases.never_the_wrong_node, websocket)
    case(5, "a node that goes away", cases.a_node_that_goes_away, websocket)
    case(7, "the gateway restarts", cases.gateway_restarts, websocket)
    case(7, "the gateway is killed amid cp", cases.killed_amid_cp, websocket)

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
    case(7, "the gateway is killed amid cp, Unix socket", cases.killed_amid_cp, websocket)
    case(6, "agents follow their kubelets' rotating certificates", cases.agents_follow_rotation, websocket, first)


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
