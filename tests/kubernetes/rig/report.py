"""The table of cases: each printed when it has ended, all of them once more at the end, with the count."""

import time
import traceback

from lab import Failed


class Report:
    """What was tried, and how it went."""

    def __init__(self, only):
        self.only, self.rows, self.begun = only, [], time.monotonic()

    def case(self, point, name, test, *arguments):
        """Runs a test. What it returns is shown beside its name: the figures it saw."""
        if self.only and self.only not in f"{point} {name}":
            return
        begun = time.monotonic()
        try:
            result, note = "passed", test(*arguments) or ""
        except (AssertionError, Failed) as failure:
            result, note = "FAILED", str(failure)
        except Exception as failure:  # A mistake in the rig is a failure of the case, not the end of the run.
            traceback.print_exc()
            result, note = "FAILED", f"{type(failure).__name__}: {failure}"
        self.add(point, name, result, time.monotonic() - begun, note)

    def skip(self, point, name, why):
        """What cannot be tried."""
        if not self.only or self.only in f"{point} {name}":
            self.add(point, name, "skipped", 0, why)

    def broken_off(self, failure):
        """The course could not go on, for a reason that is no case's."""
        self.add("-", "everything that should have come after this", "FAILED", 0, f"{type(failure).__name__}: {failure}")

    def add(self, *row):
        self.rows.append(row)
        self.show(row, f"[{time.monotonic() - self.begun:6.1f} s] ")

    @staticmethod
    def show(row, before=""):
        point, name, result, seconds, note = row
        note = note if result == "FAILED" else note[:200]
        print(f"{before}{result:7} {point:>2}  {name:<68} {seconds:6.1f} s  {note}", flush=True)

    def finish(self):
        """Prints all, and gives the exit code."""
        if self.only and not self.rows:
            print(f"no case has {self.only!r} in its name")
        print("\n" + "-" * 150)
        for row in self.rows:
            self.show(row)
        counts = {result: sum(row[2] == result for row in self.rows) for result in ("passed", "FAILED", "skipped")}
        skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
        print(f"\n{counts['passed']} passed, {counts['FAILED']} failed{skipped}", flush=True)
        return 0 if counts["passed"] and not counts["FAILED"] else 1
