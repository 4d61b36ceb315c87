"""The tables, and the JSON file. Called by __main__.py."""

import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from goals import Goal
from networks import NETWORKS
from results import Results, cpu_per_amount, median
from systems import SYSTEMS, Kit
from workloads import WORKLOADS, Workload

# What a system's figures are divided by: the limit with as many TLS hops.
LIMITS = {2: "relay", 1: "relay-1"}


def tables(results: Results, goals: Sequence[Goal], missing: Mapping[str, str]) -> str:
    """All of it, for people."""
    parts = []
    for network, workload in dict.fromkeys((run["network"], run["workload"]) for run in results.runs):
        parts.append(_workload(results, network, WORKLOADS[workload]))
    if any(run["system"].startswith("other") for run in results.runs):
        parts.append(_other(results))
    if goals:
        parts.append(_goals(goals))
    if missing:
        parts.append("left out:\n" + "\n".join(f"  {name}: {why}" for name, why in missing.items()))
    return "\n\n".join(parts)


def _workload(results: Results, network: str, workload: Workload) -> str:
    runs = [run for run in results.runs if (run["network"], run["workload"]) == (network, workload.name)]
    systems = [name for name in SYSTEMS if any(run["system"] == name for run in runs)]
    first, *rest = workload.figures
    head = ["system", "hops", first.title, "min - max", "x relay", *(figure.title for figure in rest),
            f"CPU s/{workload.per}", "near + far", "driver + target", "PSS MiB, near + far"]
    rows, failures = [], []
    for name in systems:
        good, every = results.good(network, workload.name, name), results.of(network, workload.name, name)
        failed = [run["error"] for run in every if "error" in run]
        if failed:
            failures.append(f"  {name} FAILED in {len(failed)} of {len(every)}: {failed[0]}")
        if not good:
            rows.append([name, str(SYSTEMS[name].hops), "FAILED"])
            continue
        values = results.values(network, workload.name, name, first.key)
        limit = results.median(network, workload.name, LIMITS[SYSTEMS[name].hops], first.key)
        own = median(values)
        rows.append([
            name, str(SYSTEMS[name].hops), _number(own, first.digits),
            f"{_number(min(values), first.digits)} - {_number(max(values), first.digits)}" if values else "-",
            f"{own / limit:.2f}" if own is not None and limit else "-",
            *(_number(results.median(network, workload.name, name, figure.key), figure.digits) for figure in rest),
            _number(median(_known(map(cpu_per_amount, good))), 3), *_processes(good)])
    seconds = runs[0]["seconds"] if "seconds" in runs[0] else "-"
    repeats = max(run["repeat"] for run in runs)
    title = f"{workload.name}: {workload.title}; {NETWORKS[network].title}; medians of {repeats} of {seconds} s"
    return "\n".join([title, *_align([head, *rows]), *failures])


def _processes(good: Sequence[dict]) -> tuple[str, str, str]:
    """Of each process, the gateway's side before the edge's: CPU, then that of driver and target, then memory."""
    names = list(good[0]["processes"])

    def per_amount(read) -> float | None:
        return median(read(run) / run["amount"] for run in good if run["amount"])
    cpu = [per_amount(lambda run, name=name: run["processes"][name]["cpu_s"]) for name in names]
    others = [per_amount(lambda run, key=key: run[key]) for key in ("driver_cpu_s", "target_cpu_s")]
    memory = [median(run["processes"][name]["pss_mib"] for run in good) for name in names]
    return (" + ".join(_number(value, 3) for value in cpu), " + ".join(_number(value, 3) for value in others),
            " + ".join(_number(value, 1) for value in memory))


def _other(results: Results) -> str:
    """Before and after."""
    rows = [["workload", "network", "of", "edge-tunnel / other", "edge-tunnel-uds / other-uds"]]
    for network, workload in dict.fromkeys((run["network"], run["workload"]) for run in results.runs):
        for key, title in ((WORKLOADS[workload].figures[0].key, WORKLOADS[workload].figures[0].title), ("cpu", "CPU")):
            ratios = []
            for ours, theirs in (("edge-tunnel", "other"), ("edge-tunnel-uds", "other-uds")):
                new, old = (results.median(network, workload, name, key) for name in (ours, theirs))
                ratios.append(f"{new / old:.2f}" if new is not None and old else "-")
            rows.append([workload, network, title, *ratios])
    return "\n".join(["this build / the other build", *_align(rows)])


def _goals(goals: Sequence[Goal]) -> str:
    rows = [["goal", "wanted", "met", "measured"]]
    for goal in goals:
        ratios = "  ".join(f"{label} {'failed' if math.isnan(ratio) else _number(ratio, 2)}"
                           for label, ratio in goal.ratios.items())
        rows.append([goal.text, goal.wanted, goal.verdict, ratios])
    return "\n".join(["the goals, as ratios of medians", *_align(rows)])


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Numbers to the right, words to the left."""
    count = max(map(len, rows))
    rows = [[*row, *[""] * (count - len(row))] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(count)]

    def cell(text: str, width: int) -> str:
        return text.rjust(width) if re.match(r"[\d.-]+( [-+] [\d.]+)*$", text) else text.ljust(width)
    lines = ["  " + "  ".join(map(cell, row, widths)).rstrip() for row in rows]
    return [lines[0], "  " + "-" * (sum(widths) + 2 * count - 2), *lines[1:]]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def write(path: Path, results: Results, goals: Sequence[Goal], missing: Mapping[str, str], kit: Kit,
          options: Mapping[str, object]) -> None:
    """All raw runs, what follows from them, and what they were measured on."""
    path.write_text(json.dumps({
        "machine": machine(), "options": options,
        "systems": {name: {"hops": system.hops, "about": system.about, "version": _version(kit, system.name),
                           **({"missing": missing[name]} if name in missing else {})}
                    for name, system in SYSTEMS.items()},
        "networks": {name: {"title": network.title, "congestion_control": network.congestion, **network.link}
                     for name, network in NETWORKS.items()},
        "goals": [goal.as_json() for goal in goals], "medians": results.medians(), "runs": results.runs,
    }, indent=1) + "\n")


def machine() -> dict[str, object]:
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {"cores": os.cpu_count(), "cpu": cpu[1] if cpu else platform.machine(),
            "memory_gib": round(int(memory[1]) / 2**20, 1), "kernel": platform.release(),
            "rustc": _first_line(["rustc", "--version"]), "go": _first_line(["go", "version"])}


def _version(kit: Kit, name: str) -> str:
    if peer := SYSTEMS[name].peer:
        return kit.peers[peer].version if peer in kit.peers else ""
    if name.startswith("haproxy"):
        return _first_line(["haproxy", "-v"])
    if name.startswith("relay"):
        return _first_line([kit.compare, "--version"])
    binaries = kit.other if name.startswith("other") else kit.binaries
    return _first_line([binaries / "tunnel-server", "--version"]) if binaries else ""


def _first_line(argv: Sequence[object]) -> str:
    if not shutil.which(str(argv[0])):
        return ""
    said = subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=20).stdout
    return (said.splitlines() or [""])[0]
