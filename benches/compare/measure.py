"""One measurement: one workload through one system, with the CPU time and the memory of all that took part.

CPU time is that of the whole run of the driver, warm-up included, and so is what it is divided by. Memory is PSS, in
which pages that processes share are counted once. Used by __main__.py.
"""

import json
import os
import select
import subprocess
import time
from pathlib import Path

from netlab.lab import Program
from networks import Network
from systems import Broken, Stage, last_words
from workloads import Workload

TICK = os.sysconf("SC_CLK_TCK")
# For a driver that should have ended by itself, in seconds.
GRACE = 10
STREAMS = 1000


class Driver:
    """The driver while it runs."""

    def __init__(self, stage: Stage, argv: list[str], seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.out, self.errors = stage.folder / "drive.out", stage.folder / "drive.err"
        with open(self.out, "wb") as out, open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(stage.place.cloud.argv(argv), stdin=subprocess.PIPE, stdout=out,
                                            stderr=errors, start_new_session=True)

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()

    def line(self) -> dict:
        """What it has printed, once it has."""
        while not (text := self.out.read_text()).endswith("\n"):
            if self._wait(0.02):
                self._end()
                raise Broken("the driver has ended without a word")
        return json.loads(text)

    def work(self, seconds: float) -> None:
        """Lets it work for so long, or until it has ended."""
        self._wait(seconds)

    def end(self) -> float:
        """Waits for its end, which must be a good one, and gives its CPU seconds."""
        self.process.stdin.close()
        self._wait(None)
        return self._end()

    def _wait(self, seconds: float | None) -> bool:
        """For so long, or as long as there is: whether it has ended. Nothing of it is collected yet."""
        left = self.deadline - time.monotonic()
        watch = os.pidfd_open(self.process.pid)
        try:
            ended = bool(select.select([watch], [], [], max(0, left if seconds is None else min(left, seconds)))[0])
        finally:
            os.close(watch)
        if not ended and time.monotonic() >= self.deadline:
            raise Broken("the driver hangs")
        return ended

    def _end(self) -> float:
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode != 0:
            lines = self.errors.read_text(errors="replace").strip().splitlines() or ["it says nothing"]
            raise Broken(lines[-1].removeprefix("tunnel-compare: ")[:400])
        return usage.ru_utime + usage.ru_stime


def measure(stage: Stage, workload: Workload, network: Network, seconds: float) -> dict:
    """The driver's figures, and what it cost: {"figures", "processes", "driver_cpu_s", "target_cpu_s"}."""
    argv = stage.drive(workload.kind, *workload.words, "--seconds", seconds, "--warm-up", network.warm_up,
                       "--limit", network.limit)
    limit = network.warm_up + seconds + network.limit + GRACE
    before = _all_pss(stage)
    target, cpu = _cpu(stage.target), _all_cpu(stage)
    with stage.place.weather(), Driver(stage, argv, limit) as driver:
        if workload.kind == "idle":
            driver.line()
            # What it took to open the streams is not what they cost.
            target, cpu = _cpu(stage.target), _all_cpu(stage)
            time.sleep(seconds)
            used, memory = _all_cpu(stage), _all_pss(stage)
            figures = _idle(before, memory)
            ends = _cpu(stage.target) - target
            driver.end()
            # All of the driver's is for the opening and the end.
            driver_cpu = 0.0
        else:
            # Towards the end, while buffers and windows are as large as they become.
            driver.work(network.warm_up + seconds * 0.75)
            memory = _all_pss(stage)
            driver_cpu = driver.end()
            ends = _cpu(stage.target) - target
            used = _all_cpu(stage)
            figures = driver.line()
    if failed := figures.get("failed"):
        raise Broken(f"{failed:g} of its requests failed")
    spent = {name: used[name] - cpu[name] for name in cpu}
    amount = _amount(workload, figures, seconds, network.warm_up)
    return {
        "seconds": seconds, "figures": figures, "amount": amount, "driver_cpu_s": driver_cpu,
        "target_cpu_s": ends,
        "processes": {name: {"cpu_s": spent[name], "pss_mib": memory[name], "pss_before_mib": before[name]}
                      for name in spent},
    }


def _idle(before: dict[str, float], memory: dict[str, float]) -> dict[str, float]:
    more = sum(memory.values()) - sum(before.values())
    return {"pss_mib": sum(memory.values()), "kib_a_stream": more * 1024 / STREAMS}


def _amount(workload: Workload, figures: dict, seconds: float, warm_up: float) -> float:
    """Of what CPU seconds are counted for, with the warm-up, which costs no less."""
    whole = seconds + warm_up
    if "total_bytes" in figures:
        return figures["total_bytes"] / 2**30
    if workload.kind == "idle":
        return seconds / 1000
    if workload.kind == "requests":
        return figures["per_s"] * whole / 1000
    return figures["count"] * whole / seconds / 1000


def _all_cpu(stage: Stage) -> dict[str, float]:
    return {name: _cpu(program) for name, program in stage.programs.items()}


def _cpu(program: Program) -> float:
    """User and system seconds of all its threads."""
    fields = _read(program, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def _all_pss(stage: Stage) -> dict[str, float]:
    return {name: _pss(program) for name, program in stage.programs.items()}


def _pss(program: Program) -> float:
    """MiB."""
    lines = _read(program, "smaps_rollup").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def _read(program: Program, name: str) -> str:
    if not program.alive():
        raise Broken(f"{Path(program.argv[0]).name} has ended: {last_words(program)}")
    return Path(f"/proc/{program.pid}/{name}").read_text()
