"""The command's course: for each directory, the cluster, the calm cases, the chaos, a picture. Called by `run`."""

import argparse
import random
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import Cases  # noqa: E402
from chaos import Chaos, truncated  # noqa: E402
from client import Client, counts, failures, said  # noqa: E402
from cluster import ADDRESSES, Cluster  # noqa: E402
from netlab.lab import Failed, Lab, enter  # noqa: E402
from picture import draw  # noqa: E402
from record import Record  # noqa: E402
from report import Report, check  # noqa: E402
from traffic import LIMIT, Outcome  # noqa: E402

DIRECTORIES = ("peers", "etcd")
DESCRIPTION = """\
Three gateways behind haproxy, six edges behind NAT, a load of requests of which each is counted, and faults.

  tests/cluster/run                                what CI runs: the calm cases, and a minute of chaos in all
  tests/cluster/run --minutes 5 --seed 7           more of it, with the faults of that seed
  tests/cluster/run --directory etcd --only kill   some cases only

Must be root, for namespaces; nothing is left of them. What was measured is drawn as an SVG in the output folder.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/cluster/run", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1, metavar="N", help="of chaos, over all directories (1)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the chaos; drawn and printed if not given")
    parser.add_argument("--directory", choices=(*DIRECTORIES, "both"), default="both")
    parser.add_argument("--addresses", choices=ADDRESSES,
                        help="whether edges can reach each gateway itself; as the seed says if not given")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="for pictures, and for all logs if a case fails; a temporary one if not given")
    parser.add_argument("--keep", action="store_true", help="keep the logs in any case")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases with this text in their name")
    parser.add_argument("--binaries", type=Path, required=True, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error("--minutes must be more than 0")
    return options


def main() -> int:
    options = arguments()
    enter({"haproxy": "haproxy", "etcd": "etcd-server", "etcdctl": "etcd-client", "curl": "curl"})
    seed = options.seed if options.seed is not None else int(time.time()) % 100_000
    out = options.out or Path(tempfile.mkdtemp(prefix="edge-tunnel-cluster."))
    out.mkdir(parents=True, exist_ok=True)
    print(f"==> seed {seed}, output in {out}", flush=True)
    directories = DIRECTORIES if options.directory == "both" else (options.directory,)
    # Each directory with another kind of addresses; which ones, the seed says, whichever of them are run.
    kinds = dict(zip(DIRECTORIES, random.Random(seed).sample(ADDRESSES, len(DIRECTORIES))))
    report = Report(options.only)
    work = Path(tempfile.mkdtemp(prefix="work.", dir=out))
    try:
        with Lab() as lab:
            cluster = Cluster(lab, work, options.binaries)
            for directory in directories:
                seconds = options.minutes * 60 / len(directories)
                run(cluster, report, directory, options.addresses or kinds[directory], seed, seconds, out)
    except Failed as failure:
        report.add("-", "everything that should have come after this", "FAILED", 0.0, str(failure))
    code = report.finish()
    if code or options.keep:
        logs = out / "logs"
        shutil.rmtree(logs, ignore_errors=True)
        shutil.move(work / "logs", logs)
        print(f"the logs of all programs: {logs}; the same faults again: {again(options, seed)}")
    shutil.rmtree(work)
    return code


def again(options: argparse.Namespace, seed: int) -> str:
    """The command for it."""
    words = ["tests/cluster/run", "--minutes", f"{options.minutes:g}", "--seed", str(seed)]
    words += ["--directory", options.directory]
    words += ["--addresses", options.addresses] if options.addresses else []
    words += ["--only", options.only] if options.only else []
    return shlex.join(words)


def run(cluster: Cluster, report: Report, directory: str, addresses: str, seed: int, seconds: float, out: Path) -> None:
    record, begun = Record(), time.time()
    print(f"==> directory {directory}; the gateways' own addresses are {addresses}", flush=True)
    try:
        cluster.start(directory, addresses)
        client = Client(cluster)
        with client:
            cases, chaos = Cases(cluster, client, record), Chaos(cluster, client, record, seed, seconds)

            def case(name, test):
                report.case(directory, name, test)
            case("every node through every gateway", cases.every_node_through_every_gateway)
            case("forwarded at most one hop", cases.one_hop_at_most)
            case("rolling restart of all gateways under load", cases.rolling_restart)
            case("long streams end at the drain deadline only", cases.long_streams_end_at_the_deadline)
            case("a gateway is killed under load", cases.a_gateway_is_killed)
            case("a new link is known to every gateway within a second", cases.new_links_are_known)
            if directory == "etcd":
                case("etcd is away, and comes back", cases.etcd_is_away)
            case("a fourth gateway joins, and leaves", cases.a_gateway_joins)
            case("chaos: all works again after each bout", chaos.run)
            case("chaos: time until every node was reached everywhere", chaos.recovered)
            case("chaos: no request fails from then until the next bout", chaos.quiet_between)
        case("every request is accounted for", client.accounted)
        case("no request was answered wrongly, none hung", lambda: judge(client, record))
        case("no target saw an end that was none", lambda: truncated(cluster, record, begun))
        picture = out / f"{directory}.svg"
        picture.write_text(draw(
            f"Directory {directory}, gateways' own addresses {addresses}, seed {seed}", client.outcomes, record.events,
            [phase[1:] for phase in report.phases if phase[0] == directory], begun, time.time()))
        print(f"==> {picture}", flush=True)
    finally:
        cluster.stop()


def judge(client: Client, record: Record) -> str:
    """Over everything that was sent, in calm and in chaos. What has ended too late hung, too."""
    outcomes = client.outcomes
    short = [outcome for outcome in outcomes if outcome.kind != "echo"]
    late = [one for one in short if one.result != "HUNG" and took(one) > LIMIT + record.frozen(one.begun, one.ended)]
    bad = [outcome for outcome in failures(outcomes) if outcome.result != "failed"]
    count = counts(outcomes)
    words = f"{len(outcomes)} requests: {count['delivered']} delivered whole, {count['failed']} failed loudly, " \
            f"{count['WRONG']} wrong, {count['HUNG']} hung, {len(late)} late; the longest of the short ones took " \
            f"{max(map(took, short), default=0):.1f} s"
    for one in (bad + late)[:1]:
        words += f"; the first: {one.kind} of {one.node} through {one.address} at {one.begun:.3f}: {said(one)} after " \
                 f"{took(one):.1f} s"
    check(not bad and not late, words)
    return words


def took(outcome: Outcome) -> float:
    return outcome.ended - outcome.begun


if __name__ == "__main__":
    sys.exit(main())
