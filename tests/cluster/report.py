"""The table of cases: each printed when it has ended, all of them once more at the end, with the count."""

import time
import traceback
from collections import Counter
from collections.abc import Callable

from netlab.lab import Failed


def check(condition: object, text: str) -> None:
    """Like `assert`, with words, and never optimised away."""
    if not condition:
        raise AssertionError(text)


class Skipped(Exception):
    """The case cannot be tried, for this reason."""


class Report:
    """What was tried, and how it went. The rows are also what a picture calls its stretches of time."""

    def __init__(self, only: str) -> None:
        self.only, self.begun = only, time.monotonic()
        self.rows: list[tuple[str, str, str, float, str]] = []
        # (directory, name, from, to), by the wall's clock.
        self.phases: list[tuple[str, str, float, float]] = []

    def wanted(self, name: str) -> bool:
        return self.only in name

    def case(self, directory: str, name: str, test: Callable[[], str | None]) -> None:
        """Runs a test. What it returns is shown beside its name: the figures it saw."""
        if not self.wanted(name):
            return
        begun, wall = time.monotonic(), time.time()
        try:
            result, note = "passed", test() or ""
        except Skipped as reason:
            result, note = "skipped", str(reason)
        except (AssertionError, Failed) as failure:
            result, note = "FAILED", str(failure)
        except Exception as failure:  # A mistake in the rig is a failure of the case, not the end of the run.
            traceback.print_exc()
            result, note = "FAILED", f"{type(failure).__name__}: {failure}"
        self.phases.append((directory, name, wall, time.time()))
        self.add(directory, name, result, time.monotonic() - begun, note)

    def add(self, *row: str | float) -> None:
        self.rows.append(row)
        self.show(row, f"[{time.monotonic() - self.begun:6.1f} s] ")

    @staticmethod
    def show(row: tuple[str | float, ...], before: str = "") -> None:
        directory, name, result, seconds, note = row
        note = note if result == "FAILED" else note[:220]
        print(f"{before}{result:7} {directory:5}  {name:<62} {seconds:6.1f} s  {note}", flush=True)

    def finish(self) -> int:
        """Prints all, and gives the exit code."""
        print("\n" + "-" * 150)
        for row in self.rows:
            self.show(row)
        count = Counter(row[2] for row in self.rows)
        passed, failed, skipped = count["passed"], count["FAILED"], count["skipped"]
        print(f"\n{passed} passed, {failed} failed, {skipped} skipped", flush=True)
        return 0 if passed and not failed else 1
