"""What happened when, beside the requests: the events that cases and chaos make, for the picture and the judgement."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator


@dataclasses.dataclass
class Event:
    """What was done to something, from when to when, by the wall's clock; for some, the end is not known yet."""

    lane: str
    what: str
    begun: float
    ended: float | None = None


class Record:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def event(self, lane: str, what: str) -> Iterator[Event]:
        """For as long as the block lasts."""
        event = Event(lane, what, time.time())
        with self.lock:
            self.events.append(event)
        try:
            yield event
        finally:
            event.ended = time.time()

    def frozen(self, begun: float, ended: float) -> float:
        """For how long, of that time, some gateway was."""
        return sum(max(0.0, min(ended, event.ended or ended) - max(begun, event.begun))
                   for event in self.events if event.what == "SIGSTOP")

    def killed(self, lane: str, at: float, seconds: float) -> bool:
        """Whether it was killed that long before, at most."""
        return any(event.lane == lane and "kill" in event.what and -0.1 < at - event.begun < seconds
                   for event in self.events)
