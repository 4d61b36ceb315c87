#!/usr/bin/env python3
"""That goals are judged as they read: of medians, in the right direction, and never by runs that failed."""

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from goals import judge  # noqa: E402
from results import Results  # noqa: E402


def results(*runs: tuple[str, str, str, dict, float]) -> Results:
    """Of (network, workload, system, figures, CPU seconds for one GiB, or whatever it is)."""
    made = Results()
    made.runs = [{"network": network, "workload": workload, "system": system, "figures": figures, "amount": 1,
                  "processes": {"near": {"cpu_s": cpu / 2}, "far": {"cpu_s": cpu / 2}}}
                 for network, workload, system, figures, cpu in runs]
    return made


def bulk(system: str, rate: float, cpu: float) -> tuple[str, str, str, dict, float]:
    return "loopback", "bulk-1-down", system, {"gbit_per_s": rate}, cpu


def verdicts(made: Results) -> dict[str, str]:
    return {goal.text: goal.verdict for goal in judge(made)}


class Goals(unittest.TestCase):
    def test_bulk_is_judged_in_total_and_per_cpu_second(self) -> None:
        made = results(bulk("edge-tunnel", 9.1, 1.0), bulk("relay", 10, 0.8), bulk("haproxy", 9.1, 1.1))
        self.assertEqual(verdicts(made), {
            "bulk: edge-tunnel / relay, in total": "yes", "bulk: edge-tunnel / relay, per CPU second": "NO",
            # Above, not as much.
            "bulk: edge-tunnel / haproxy, in total": "NO", "bulk: edge-tunnel / haproxy, per CPU second": "yes"})

    def test_medians_count_not_the_best(self) -> None:
        made = results(*(bulk("edge-tunnel", rate, 1) for rate in (8, 8.5, 30)), bulk("relay", 10, 1))
        self.assertEqual(verdicts(made)["bulk: edge-tunnel / relay, in total"], "NO")

    def test_a_failed_run_meets_no_goal(self) -> None:
        for system in ("edge-tunnel", "relay"):
            made = results(bulk("edge-tunnel", 20, 0.1), bulk("relay", 10, 1))
            made.runs.append({"network": "loopback", "workload": "bulk-1-down", "system": system, "error": "it hangs"})
            self.assertEqual(set(verdicts(made).values()), {"NO"}, system)

    def test_one_bad_ratio_of_many_is_a_goal_missed(self) -> None:
        made = results(bulk("edge-tunnel", 20, 1), bulk("relay", 10, 1))
        made.runs += results(*(("loopback", "bulk-8-up", system, {"gbit_per_s": rate}, 1)
                               for system, rate in (("edge-tunnel", 5), ("relay", 10)))).runs
        self.assertEqual(verdicts(made)["bulk: edge-tunnel / relay, in total"], "NO")

    def test_pings_beside_bulk_are_judged_by_quiet_ones_of_the_same_network(self) -> None:
        def pings(network: str, workload: str, p99: float) -> tuple[str, str, str, dict, float]:
            return network, workload, "edge-tunnel", {"p99_us": p99}, 1
        made = results(pings("loopback", "ping", 100), pings("loopback", "interleaved-down", 501),
                       pings("wan", "ping", 50_000), pings("wan", "interleaved-down", 60_000),
                       pings("mobile", "ping", 1), pings("mobile", "interleaved-down", 1000))
        goal, = judge(made)
        self.assertEqual(goal.ratios, {"interleaved-down, loopback": 5.01, "interleaved-down, wan": 1.2})
        self.assertEqual(goal.verdict, "NO")

    def test_the_first_byte_may_take_a_round_trip_longer(self) -> None:
        def first(network: str, system: str, p50: float) -> tuple[str, str, str, dict, float]:
            return network, "first-byte", system, {"p50_us": p50}, 1
        made = results(first("wan", "edge-tunnel", 180_000), first("wan", "haproxy", 100_000))
        self.assertEqual([goal.ratios for goal in judge(made)], [{"wan": 1.3}])
        self.assertEqual(set(verdicts(made).values()), {"yes"})
        made = results(first("loopback", "edge-tunnel", 140), first("loopback", "haproxy", 100))
        self.assertEqual(set(verdicts(made).values()), {"NO"})

    def test_new_connections_are_compared_with_konnectivitys_of_the_same_door(self) -> None:
        made = results(*(("loopback", "requests", system, {"per_s": rate}, cpu) for system, rate, cpu in (
            ("edge-tunnel", 3000, 1), ("konnectivity", 1000, 2.9), ("konnectivity-uds", 10, 10))))
        self.assertEqual(verdicts(made), {"new connections a second: edge-tunnel / konnectivity": "yes",
                                          "new connections per CPU second: edge-tunnel / konnectivity": "NO"})

    def test_what_was_not_measured_is_no_goal(self) -> None:
        self.assertEqual(judge(results(bulk("edge-tunnel", 20, 1))), [])


if __name__ == "__main__":
    program = unittest.main(exit=False)
    failed = len(program.result.failures) + len(program.result.errors)
    print(f"\n{program.result.testsRun - failed} passed, {failed} failed", flush=True)
    sys.exit(failed > 0)
