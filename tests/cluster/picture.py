"""The picture of a run: what got through, what failed and how, how long it took, and what was done meanwhile. An SVG,
written by hand, since a plotting library is many times the size of this. Called by __main__.py."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape

from client import cause
from record import Event
from traffic import Outcome

WIDTH, LEFT, RIGHT = 1500, 120, 40
PLOT = WIDTH - LEFT - RIGHT
INK, FAINT, GRID, PAPER = "#1f2933", "#6b7785", "#e4e8ec", "#ffffff"
GOOD, BAD = "#2a9d8f", "#d1495b"
CAUSES = {"node has no link": "#e9a03b", "503 other": "#d1495b", "504": "#7b4b94", "502": "#a23b72", "404": "#556270",
          "cut": "#2e86ab", "reset": "#1b4965", "not accepted": "#b8b42d", "TLS": "#8d6a4f", "other": "#999999",
          "WRONG": "#000000", "HUNG": "#ff00aa"}
# Of an event, by a word in it.
COLOURS = (("kill", "#d1495b"), ("SIGTERM", "#2e86ab"), ("SIGSTOP", "#7b4b94"), ("|", "#e9a03b"), ("ms", "#b9c45f"),
           ("joins", "#2a9d8f"), ("new", "#2a9d8f"))
CHARACTER = 5.6

Point = tuple[float, float]


def draw(title: str, outcomes: Sequence[Outcome], events: Sequence[Event], phases: Sequence[tuple[str, float, float]],
         begun: float, ended: float) -> str:
    return Picture(title, outcomes, events, phases, begun, ended).svg()


class Picture:
    def __init__(self, title: str, outcomes: Sequence[Outcome], events: Sequence[Event],
                 phases: Sequence[tuple[str, float, float]], begun: float, ended: float) -> None:
        self.title, self.begun, self.ended = title, begun, max(ended, begun + 1)
        self.short = [one for one in outcomes if one.of_load]
        # Without the rig's own questions that were refused: it asks until a new node is known.
        self.outcomes = [one for one in outcomes if one.kind == "echo" or not one.tag or one.result != "failed"]
        self.events = [event for event in events if event.lane != "calm"]
        self.calm = [event for event in events if event.lane == "calm"]
        # What only looks at what was counted takes no time.
        self.phases = [phase for phase in phases if phase[2] - phase[1] > 0.3]
        # No more columns than can be told apart.
        length = self.ended - begun
        self.bin = next(step for step in (0.5, 1, 2, 5, 10, 30, 60) if length / step <= PLOT / 3.5 or step == 60)
        self.parts: list[str] = []
        self.top = 0.0

    def svg(self) -> str:
        self._heading()
        self._phase_names()
        plots = self.top
        self._throughput()
        self._failures()
        self._latency()
        self._lanes()
        self._axis()
        bands = "".join(self._bands(plots, self.top - 34))
        height = self.top + 16
        return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
                f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="DejaVu Sans, Verdana, sans-serif" font-size="11">\n'
                f'<rect width="100%" height="100%" fill="{PAPER}"/>\n{bands}' + "\n".join(self.parts) + "\n</svg>\n")

    # Pieces.

    def _x(self, at: float) -> float:
        return LEFT + PLOT * (min(max(at, self.begun), self.ended) - self.begun) / (self.ended - self.begun)

    def _text(self, x: float, y: float, words: str, colour: str = INK, anchor: str = "start", size: float = 11,
              weight: str = "normal") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-size="{size}" '
                          f'font-weight="{weight}">{escape(words)}</text>')

    def _box(self, x: float, y: float, width: float, height: float, colour: str, extra: str = "") -> None:
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.2f}" fill="{colour}" '
                          f'{extra}/>')

    def _line(self, points: Iterable[Point], colour: str, width: float = 1.4, extra: str = "") -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" {extra}/>')

    def _rule(self, y: float, words: str) -> None:
        self._line([(LEFT, y), (LEFT + PLOT, y)], GRID, 1)
        self._text(LEFT - 8, y + 4, words, FAINT, "end")

    def _panel(self, name: str, unit: str, height: float) -> tuple[float, float]:
        """Its upper and lower edge."""
        self._text(LEFT, self.top + 18, name, INK, size=13, weight="bold")
        self._text(LEFT + 8 * len(name) + 14, self.top + 18, unit, FAINT)
        upper = self.top + 28
        self.top = upper + height + 14
        return upper, upper + height

    def _legend(self, y: float, entries: Sequence[tuple[str, str]]) -> None:
        x = LEFT + PLOT
        for words, colour in reversed(entries):
            x -= len(words) * 6.6 + 4
            self._text(x, y, words, INK)
            self._box(x - 14, y - 9, 10, 10, colour, 'rx="2"')
            x -= 28

    # From above to below.

    def _heading(self) -> None:
        self._text(LEFT, 34, self.title, size=18, weight="bold")
        count = Counter(outcome.result for outcome in self.outcomes)
        parts = [(f"{len(self.outcomes)} requests", INK), (f"{count['delivered']} delivered whole", GOOD),
                 (f"{count['failed']} failed loudly", BAD), (f"{count['WRONG']} wrong", INK),
                 (f"{count['HUNG']} hung", INK)]
        x = float(LEFT)
        for words, colour in parts:
            self._text(x, 56, words, colour, size=13)
            x += len(words) * 8 + 22
        self.top = 66

    def _phase_names(self) -> None:
        """Numbers above the bands, and below the heading what they are."""
        columns, row = 3, 16
        for number, (name, _, _) in enumerate(self.phases, 1):
            index = number - 1
            x = LEFT + (index % columns) * PLOT / columns
            self._text(x, self.top + 14 + row * (index // columns), f"{number}  {name}", FAINT)
        self.top += row * math.ceil(len(self.phases) / columns) + 26
        for number, (_, begun, ended) in enumerate(self.phases, 1):
            x = (self._x(begun) + self._x(ended)) / 2
            if self._x(ended) - self._x(begun) > 6:
                self._text(x, self.top, str(number), INK, "middle", weight="bold")

    def _bands(self, upper: float, lower: float) -> Iterator[str]:
        for number, (_, begun, ended) in enumerate(self.phases):
            colour = "#f6f8fa" if number % 2 else "#eef2f6"
            yield (f'<rect x="{self._x(begun):.1f}" y="{upper + 4:.1f}" width="{self._x(ended) - self._x(begun):.1f}" '
                   f'height="{lower - upper:.1f}" fill="{colour}"/>\n')
        for event in self.calm:
            begun, ended = self._x(event.begun), self._x(event.ended or self.ended)
            yield (f'<rect x="{begun:.1f}" y="{upper + 4:.1f}" width="{ended - begun:.1f}" '
                   f'height="{lower - upper:.1f}" fill="#dcefe6"/>\n')

    def _binned(self, outcomes: Iterable[Outcome], key: Callable[[Outcome], str]) -> dict[str, Counter[int]]:
        found: dict[str, Counter[int]] = defaultdict(Counter)
        for outcome in outcomes:
            found[key(outcome)][int((outcome.ended - self.begun) / self.bin)] += 1
        return found

    def _throughput(self) -> None:
        upper, lower = self._panel("Short requests", "that ended, each second", 120)
        bins = self._binned(self.short, lambda one: "delivered whole" if one.result == "delivered" else "failed")
        self._stack(bins, {"delivered whole": GOOD, "failed": BAD}, upper, lower)
        self._legend(upper - 10, [("delivered whole", GOOD), ("failed", BAD)])

    def _failures(self) -> None:
        upper, lower = self._panel("Failures", "by what the client was told, each second", 90)
        bins = self._binned((one for one in self.outcomes if one.result != "delivered"), cause)
        colours = {name: colour for name, colour in CAUSES.items() if name in bins}
        self._stack(bins, colours, upper, lower)
        self._legend(upper - 10, [(f"{name} {sum(bins[name].values())}", colour) for name, colour in colours.items()])

    def _stack(self, bins: dict[str, Counter[int]], colours: dict[str, str], upper: float, lower: float) -> None:
        sums: Counter[int] = sum(bins.values(), Counter())
        most = max(sums.values(), default=0) / self.bin
        step = nice(most / 3)
        top = max(step * math.ceil(most / step), step)
        scale = (lower - upper) / top
        for number in range(int(top / step) + 1):
            self._rule(lower - number * step * scale, f"{number * step:g}")
        width = PLOT * self.bin / (self.ended - self.begun)
        for index in sorted(sums):
            y = lower
            for name, colour in colours.items():
                if count := bins[name][index] / self.bin if name in bins else 0:
                    y -= count * scale
                    x = LEFT + index * width
                    self._box(x, y, min(width * 0.92, LEFT + PLOT - x), count * scale, colour)

    def _latency(self) -> None:
        upper, lower = self._panel("Time of a delivered short request", "until its last byte, logarithmic", 120)
        times: dict[int, list[float]] = defaultdict(list)
        for one in self.short:
            if one.result == "delivered":
                times[int((one.begun - self.begun) / self.bin)].append(one.ended - one.begun)
        least, most = math.log10(0.003), math.log10(30)

        def y(seconds: float) -> float:
            return lower - (lower - upper) * (min(max(math.log10(seconds), least), most) - least) / (most - least)
        for seconds, words in ((0.01, "10 ms"), (0.1, "100 ms"), (1, "1 s"), (10, "10 s")):
            self._rule(y(seconds), words)
        kinds: tuple[tuple[str, str, Callable[[list[float]], float]], ...] = (
            ("worst", "#c9b6d8", max),
            ("99 of 100", "#7b4b94", lambda some: sorted(some)[math.ceil(len(some) * 0.99) - 1]),
            ("median", GOOD, statistics.median))
        for _, colour, figure in kinds:
            for run in runs(sorted(times)):
                points = [(self._x(self.begun + (index + 0.5) * self.bin), y(figure(times[index]))) for index in run]
                if len(points) == 1:
                    points = [(points[0][0] - 1, points[0][1]), (points[0][0] + 1, points[0][1])]
                self._line(points, colour, extra='stroke-linejoin="round"')
        self._legend(upper - 10, [(name, colour) for name, colour, _ in kinds])

    def _lanes(self) -> None:
        """A lane for each thing that something was done to; where two overlap, or their names would, one is below."""
        self._panel("What was done", "each bar as long as it lasted; on green, everything must recover", 0)
        self.top -= 6
        for lane in sorted({event.lane for event in self.events}, key=place):
            rows: list[float] = []
            upper, height = self.top, 15
            for event in sorted((event for event in self.events if event.lane == lane), key=lambda event: event.begun):
                x = self._x(event.begun)
                width = max(self._x(event.ended or self.ended) - x, 3)
                name = event.what if lane in ("network", "edges", "etcd") else short(event.what)
                inside = len(name) * CHARACTER + 6 < width
                reach = x + width + (0 if inside else len(name) * CHARACTER + 6) + 3
                row = next((number for number, end in enumerate(rows) if end <= x), len(rows))
                rows[row:row + 1] = [reach]
                y = upper + row * height
                colour = next((colour for word, colour in COLOURS if word in event.what), FAINT)
                self._box(x, y + 2, width, height - 4, colour, 'rx="2"')
                if inside:
                    self._text(x + 4, y + 11, name, PAPER if colour != "#b9c45f" else INK, size=9)
                elif x + width + len(name) * CHARACTER < LEFT + PLOT + RIGHT:
                    self._text(x + width + 3, y + 11, name, INK, size=9)
            self._text(LEFT - 8, upper + 12, lane, INK, "end")
            self.top = upper + max(1, len(rows)) * height + 3
            self._line([(LEFT, self.top - 1), (LEFT + PLOT, self.top - 1)], GRID, 1)

    def _axis(self) -> None:
        length = self.ended - self.begun
        step = nice(length / 15)
        self.top += 14
        for number in range(int(length / step) + 1):
            at = number * step
            x = self._x(self.begun + at)
            self._line([(x, self.top - 14), (x, self.top - 9)], FAINT, 1)
            self._text(x, self.top + 3, f"{int(at) // 60}:{int(at) % 60:02}", FAINT, "middle")
        self._text(LEFT + PLOT, self.top + 18, "minutes:seconds since the start", FAINT, "end")
        self.top += 20


def place(lane: str) -> tuple[int, str]:
    """Of a lane: gateways above, the network below."""
    kinds = ("gw", "etcd", "edge")
    return next((number for number, kind in enumerate(kinds) if lane.startswith(kind)), len(kinds)), lane


def short(what: str) -> str:
    return {"kill -9": "kill", "SIGTERM": "TERM", "SIGSTOP": "STOP"}.get(what, what)


def nice(step: float) -> float:
    """The next of 1, 2, 5 and their tens."""
    power = 10.0 ** math.floor(math.log10(max(step, 0.5)))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step)


def runs(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Stretches without a gap: no line is drawn where nothing was measured."""
    run: list[int] = []
    for number in numbers:
        if run and number != run[-1] + 1:
            yield run
            run = []
        run.append(number)
    if run:
        yield run
