"""All that was measured, and its medians. Filled by __main__.py, read by report.py and goals.py."""

import statistics
from collections.abc import Callable, Iterable


class Results:
    """Each run is a dict: network, workload, system, repeat, and either what `measure` gave or an `error`."""

    def __init__(self) -> None:
        self.runs: list[dict] = []

    def of(self, network: str, workload: str, system: str) -> list[dict]:
        return [run for run in self.runs
                if (run["network"], run["workload"], run["system"]) == (network, workload, system)]

    def good(self, network: str, workload: str, system: str) -> list[dict]:
        return [run for run in self.of(network, workload, system) if "error" not in run]

    def values(self, network: str, workload: str, system: str, key: str) -> list[float]:
        """Of a figure, in each good run; `cpu` is CPU seconds of all the system's processes for what the workload
        counts them by."""
        read: Callable[[dict], float | None] = (
            cpu_per_amount if key == "cpu" else lambda run: run["figures"].get(key))
        found = (read(run) for run in self.good(network, workload, system))
        return [value for value in found if value is not None]

    def median(self, network: str, workload: str, system: str, key: str) -> float | None:
        return median(self.values(network, workload, system, key))

    def medians(self) -> list[dict]:
        """For the JSON file: of each system in each workload."""
        found = []
        for network, workload, system in dict.fromkeys(
                (run["network"], run["workload"], run["system"]) for run in self.runs):
            good = self.good(network, workload, system)
            keys = [key for key in (good[0]["figures"] if good else ()) if key not in ("bytes", "seconds", "total_bytes")]
            found.append({
                "network": network, "workload": workload, "system": system, "good_runs": len(good),
                "runs": len(self.of(network, workload, system)),
                **{key: self.median(network, workload, system, key) for key in keys},
                "cpu_s_per_amount": self.median(network, workload, system, "cpu")})
        return found


def cpu_per_amount(run: dict) -> float | None:
    spent = sum(process["cpu_s"] for process in run["processes"].values())
    return spent / run["amount"] if run["amount"] else None


def median(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None
