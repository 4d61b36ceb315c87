"""The network lab's command: its self-check, or two hosts to play with. Called by `run`."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from netlab.check import Check  # noqa: E402
from netlab.lab import Lab, enter  # noqa: E402

DESCRIPTION = """\
Hosts on one machine, and links between them with a rate, delay, jitter and loss that are what was asked for.

  tests/netlab/run --self-check                                measure that they are, in half a minute
  tests/netlab/run --shell --delay 25 --rate 100               a shell on the host `left`; `right` is at the other end
  tests/netlab/run --loss 1 --delay 25 -- ping -U -c 10 right  or one command there

Inside, `nsenter --net=/run/netns/right COMMAND` runs a command at the other end. ping wants its -U: without, it takes
the time at which the kernel received the answer, and that is before the answer was delayed.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/netlab/run", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--self-check", action="store_true", help="measure all that a lab can do to packets")
    parser.add_argument("--only", default="", metavar="TEXT", help="only those cases of the self-check")
    parser.add_argument("--shell", action="store_true", help="a shell on the host `left`")
    parser.add_argument("--rate", type=float, metavar="MBIT", help="megabits a second, each way")
    parser.add_argument("--delay", type=float, default=0, metavar="MS", help="milliseconds, each way")
    parser.add_argument("--jitter", type=float, default=0, metavar="MS", help="so far to both sides of the delay")
    parser.add_argument("--loss", type=float, default=0, metavar="PERCENT", help="of the packets, each way")
    parser.add_argument("--no-netem", action="store_true", help="even where the kernel has netem, do without")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="a command on the host `left`, after --")
    options = parser.parse_args()
    if options.self_check + options.shell + bool(options.command) != 1:
        parser.error("one of --self-check, --shell or -- COMMAND")
    return options


def main() -> int:
    options = arguments()
    enter({"ping": "iputils-ping", "iperf3": "iperf3"})
    with Lab(netem=False if options.no_netem else None) as lab:
        if options.self_check:
            return Check(lab).run(options.only)
        left, right = lab.host("left"), lab.host("right")
        try:
            lab.link(left, right, rate=options.rate, delay=options.delay, jitter=options.jitter, loss=options.loss)
        except ValueError as error:
            print(f"tests/netlab/run: {error}", file=sys.stderr)
            return 2
        command = [os.environ.get("SHELL", "sh")] if options.shell else options.command
        code = subprocess.call(left.argv(command))
        return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
