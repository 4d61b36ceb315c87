"""The command's course: what is built, then each workload through each system, alternating, then the tables.

Called by `run`. peers.py builds, networks.py has the hosts, systems.py what runs on them, workloads.py what is driven,
measure.py one measurement, results.py all of them, goals.py and report.py what follows.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import peers  # noqa: E402
import report  # noqa: E402
from certificates import Certificates  # noqa: E402
from goals import judge  # noqa: E402
from measure import measure  # noqa: E402
from netlab.lab import Failed, Lab, enter  # noqa: E402
from networks import GROUPS, NETWORKS, Place  # noqa: E402
from results import Results  # noqa: E402
from systems import SYSTEMS, Broken, Kit, Stage  # noqa: E402
from workloads import WORKLOADS  # noqa: E402

# On a file system of the namespaces' own: nothing of it is left, however this ends.
FOLDER = Path("/run/compare")
# What was built outside, for the same program inside, where nothing can be built.
BUILT = "COMPARE_PEERS"
DESCRIPTION = """\
edge-tunnel beside its peers and the limit: the same work through each, alternating, on one machine, in one run.

  benches/compare/run                                              everything, on loopback
  benches/compare/run --only edge-tunnel,relay --workload bulk     some systems, some workloads
  benches/compare/run --network lab --workload bulk-1,interleaved  over links of the network lab
  benches/compare/run --edge-tunnel-binaries DIR                   this build beside another one, as `other`

Must be root, for namespaces; nothing is left of them. Figures are medians; what cannot be had, or fails, is in the
tables with the reason. Only ratios mean something, and only between systems with as many TLS hops.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benches/compare/run", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME[,NAME]", help=f"of these systems: {', '.join(SYSTEMS)}")
    parser.add_argument("--workload", metavar="NAME[,NAME]",
                        help=f"of these workloads, or all that begin so: {', '.join(WORKLOADS)}")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="of each measurement (5)")
    parser.add_argument("--seconds", type=float, default=3, metavar="S",
                        help="of each measurement (3); what needs more, as networks of the lab do, takes it")
    parser.add_argument("--network", default="loopback", metavar="NAME[,NAME]",
                        help=f"of these: {', '.join((*NETWORKS, *GROUPS))} (loopback)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes all runs, and what they were measured on")
    parser.add_argument("--edge-tunnel-binaries", type=Path, metavar="DIR",
                        help="with another tunnel-server and tunnel-edge, measured as the systems other and other-uds")
    parser.add_argument("--binaries", type=Path, required=True, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def check(options: argparse.Namespace) -> None:
    """Makes lists of names, and refuses what cannot be meant."""
    others = [name for name in SYSTEMS if name.startswith("other")]
    options.systems = chosen("--only", options.only, SYSTEMS) if options.only else list(SYSTEMS)
    options.workloads = (chosen("--workload", options.workload, WORKLOADS, begins=True)
                         if options.workload else list(WORKLOADS))
    names = chosen("--network", options.network, {**NETWORKS, **GROUPS})
    options.networks = list(dict.fromkeys(part for name in names for part in GROUPS.get(name, (name,))))
    if not options.edge_tunnel_binaries:
        if options.only and (meant := [name for name in options.systems if name in others]):
            raise ValueError(f"--only {meant[0]} needs --edge-tunnel-binaries DIR")
        options.systems = [name for name in options.systems if name not in others]
    for program in ("tunnel-server", "tunnel-edge") if options.edge_tunnel_binaries else ():
        if not (options.edge_tunnel_binaries / program).is_file():
            raise ValueError(f"--edge-tunnel-binaries: there is no {options.edge_tunnel_binaries / program}")
    if options.repeat < 1 or not 0 < options.seconds <= 600:
        raise ValueError("--repeat must be 1 or more, and --seconds more than 0 and at most 600")
    if options.json and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json: there is no folder {options.json.absolute().parent}")
    if options.json and (options.json.is_dir() or Path("/run") in options.json.absolute().parents):
        # What runs has a /run of its own.
        raise ValueError(f"--json: {options.json} cannot be a file that stays")


def chosen(option: str, text: str, known: Mapping[str, object], begins: bool = False) -> list[str]:
    """The names in a list with commas, in the order in which they are known."""
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    if not wanted:
        raise ValueError(f"{option}: names are missing; there are {', '.join(known)}")

    def means(word: str, name: str) -> bool:
        return name == word or begins and name.startswith(f"{word}-")
    for word in wanted:
        if not any(means(word, name) for name in known):
            raise ValueError(f"{option}: there is no {word}; there are {', '.join(known)}")
    return [name for name in known if any(means(word, name) for word in wanted)]


def only_one() -> socket.socket:
    """Held until this process ends: two runs at once would measure each other."""
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind("\0edge-tunnel-compare")
    except OSError:
        sys.exit("another benches/compare/run is under way, and each would slow down the other; wait for it to end")
    return name


def main() -> int:
    options = arguments()
    if BUILT not in os.environ:
        alone = only_one()
        wanted = dict.fromkeys(SYSTEMS[name].peer for name in options.systems if SYSTEMS[name].peer)
        built = peers.build(wanted)
        os.environ[BUILT] = json.dumps({name: dataclasses.asdict(peer) for name, peer in built.items()})
    # A thousand streams, and a connection on either side of each.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    enter({"haproxy": "haproxy", "openssl": "openssl"})
    results = Results()
    with Lab() as lab:
        kit, places = prepare(lab, options)
        missing = {name: kit.peers[SYSTEMS[name].peer].missing for name in options.systems
                   if SYSTEMS[name].peer and kit.peers[SYSTEMS[name].peer].missing}
        systems = [name for name in options.systems if name not in missing]
        try:
            for place in places:
                run(results, kit, place, systems, options)
        finally:
            finish(results, missing, kit, options)
    return 0 if any("error" not in run for run in results.runs) else 1


def prepare(lab: Lab, options: argparse.Namespace) -> tuple[Kit, list[Place]]:
    FOLDER.mkdir()
    built = {name: peers.Peer(**peer) for name, peer in json.loads(os.environ[BUILT]).items()}
    places = [Place(lab, NETWORKS[name]) for name in options.networks]
    # Copies: who builds while this runs must not mix two versions.
    binaries = copies(FOLDER / "binaries", options.binaries, ("tunnel-server", "tunnel-edge", "tunnel-compare"))
    other = options.edge_tunnel_binaries
    other = copies(FOLDER / "other", other, ("tunnel-server", "tunnel-edge")) if other else None
    addresses = {address for place in places for address in (place.gateway_address, place.edge_address)}
    return Kit(FOLDER, binaries, other, built, Certificates(FOLDER / "pki", addresses)), places


def copies(folder: Path, source: Path, names: Iterable[str]) -> Path:
    folder.mkdir()
    for name in names:
        shutil.copy(source / name, folder / name)
    return folder


def run(results: Results, kit: Kit, place: Place, systems: Sequence[str], options: argparse.Namespace) -> None:
    """All workloads on one network. Each repeat takes every system in turn, each time beginning with another one."""
    network, begun = place.network, time.monotonic()
    print(f"==> {network.title}", flush=True)
    for workload in (WORKLOADS[name] for name in options.workloads):
        if not workload.on(network.name):
            continue
        seconds = max(options.seconds, network.least, workload.least)
        for repeat in range(options.repeat):
            first = repeat % len(systems) if systems else 0
            for name in (*systems[first:], *systems[:first]):
                one = {"network": network.name, "workload": workload.name, "system": name, "repeat": repeat + 1}
                try:
                    with Stage(kit, place, SYSTEMS[name]).running() as stage:
                        one |= measure(stage, workload, network, seconds)
                    value = one["figures"].get(workload.figures[0].key)
                    said = f"{value} {workload.figures[0].title}"
                except (Broken, Failed, OSError) as failure:
                    one["error"] = str(failure)
                    said = f"FAILED: {failure}"
                results.runs.append(one)
                print(f"[{time.monotonic() - begun:7.1f} s] {workload.name:16} {repeat + 1}/{options.repeat}  "
                      f"{name:18} {said}", flush=True)


def finish(results: Results, missing: Mapping[str, str], kit: Kit, options: argparse.Namespace) -> None:
    """Also of what was measured until somebody has interrupted it."""
    goals = judge(results)
    print("\n" + report.tables(results, goals, missing), flush=True)
    if options.json:
        words = {key: getattr(options, key) for key in ("systems", "workloads", "networks", "repeat", "seconds")}
        report.write(options.json, results, goals, missing, kit, words)
        print(f"\nall runs: {options.json}", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
