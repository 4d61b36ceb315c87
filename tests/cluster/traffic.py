"""What goes through the tunnel, and the judgement on each request: two programs that agree on what must be answered.

    traffic.py target NODE ADDRESS PORT       what stands behind an edge; started by cluster.py on each edge's host
    traffic.py client CA CERT KEY             the control plane; started by client.py on the client's host

A connection to a target is one of these. What a target says begins with its node's name, and what follows is computed
from that name and a number, so that nobody else's answer, and no part of one, can be taken for it:

    get SIZE NUMBER   the name, then SIZE bytes, then the end
    put SIZE          SIZE bytes come, then the end of that direction; then the name and the sum of what came
    echo              lines come back until one says `end`

The client takes commands by standard input, and prints a line of JSON for each request when it has ended, whatever has
become of it:

    rate ADDRESS REQUESTS_A_SECOND NODE...    short requests from now on; 0 is none
    streams COUNT ADDRESS NODE...             so many echoes at all times; each begins anew when it has failed
    end-streams                               each ends in order after its next line
    once TAG ADDRESS NODE                     one short request, whose line has this tag
    hold TAG ADDRESS NODE                     one echo, held until it ends or end-streams
    count TAG                                 prints how many requests have begun and ended, with this tag

At the end of its input nothing more begins. When everything has ended, it counts once more (the tag is `end`), and the
program ends.

All that ends is told apart: only TLS's own end (close_notify) is a clean one. A bare FIN is a failure here, and loud.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import random
import socket
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from typing import NoReturn

# What a request may take: the gateways' timeout for dialing, and a little for the rest of the way. A gateway that is
# frozen meanwhile can answer later by that much: only the rig knows (see __main__.py), so the client itself waits for
# the longest freeze, too, before it calls a request hung.
LIMIT, FREEZE = 12.0, 6.0
DEADLINE = LIMIT + FREEZE
PORT = 10250
CHUNK = 65536
# Between two lines of an echo.
PACE = 0.25
HEAD = 16384


class Wrong(Exception):
    """An answer that is not the one to this request. Never to happen."""


class Failure(Exception):
    """The request has failed, and the client was told. In few words, the same for the same cause."""


def body(node: str, number: int, size: int) -> bytes:
    return hashlib.shake_128(f"{node} {number}".encode()).digest(size)


# The target.

async def target(node: str, address: str, port: int) -> NoReturn:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(node, reader, writer)
        except (OSError, asyncio.IncompleteReadError) as error:
            # Reset, and so known to be cut: what the other side has to judge.
            print(f"{time.time():.3f} cut: {error!r}", flush=True)
        except ValueError as error:
            print(f"{time.time():.3f} STRANGE: {error!r}", flush=True)
        finally:
            writer.close()
    server = await asyncio.start_server(serve, address, port, backlog=1024)
    print(f"{time.time():.3f} listens", flush=True)
    await server.serve_forever()
    raise SystemExit(1)


async def answer(node: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    line = await reader.readline()
    if not line:
        # Nothing was said, so nothing is cut: of two links that are tried for one request, one is not used.
        return
    if not line.endswith(b"\n"):
        short(f"the line {line!r}")
        return
    match line.decode().split():
        case ["get", size, number]:
            writer.write(f"{node}\n".encode() + body(node, int(number), int(size)))
        case ["put", size]:
            digest, came = hashlib.sha256(), 0
            while data := await reader.read(CHUNK):
                digest.update(data)
                came += len(data)
            if came != int(size):
                short(f"{came} of {size} bytes")
            writer.write(f"{node}\n{digest.hexdigest()}\n".encode())
        case ["echo"]:
            lines = 0
            while line != b"end\n":
                line = await reader.readline()
                if not line.endswith(b"\n"):
                    short(f"{lines} lines of an echo, then {line!r}")
                    break
                lines += 1
                writer.write(f"{node} ".encode() + line)
                await writer.drain()
        case words:
            print(f"{time.time():.3f} STRANGE: {words}", flush=True)
    await writer.drain()


def short(what: str) -> None:
    """A clean end where the client had none. The rig looks for this word."""
    print(f"{time.time():.3f} SHORT: {what}, and a clean end", flush=True)


# The client.

@dataclasses.dataclass
class Outcome:
    """How one request went, as one line of JSON."""

    kind: str
    node: str
    address: str
    begun: float
    tag: str = ""
    ended: float = 0
    result: str = ""
    """delivered, failed, WRONG or HUNG; for an echo, delivered means that it came to its end in order."""
    why: str = ""
    answered: float = 0
    """When the gateway's 200 had come."""

    @property
    def of_load(self) -> bool:
        """Whether it is one of the many short ones, which nobody waits for one by one."""
        return self.kind != "echo" and not self.tag


@dataclasses.dataclass
class Count:
    """How many requests there were until now, as one line of JSON. What has ended was printed before."""

    tag: str
    begun: int
    ended: int
    load: int
    """How many of the load are under way."""


class Stream:
    """TLS over a socket, with all its ends told apart, which asyncio's own does not do."""

    def __init__(self, context: ssl.SSLContext, sock: socket.socket, name: str) -> None:
        self.loop, self.sock = asyncio.get_running_loop(), sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=name)

    @classmethod
    async def connect(cls, context: ssl.SSLContext, host: str, port: int) -> "Stream":
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = cls(context, sock, host)
        try:
            await stream.loop.sock_connect(sock, (host, port))
            await stream._until_done(stream.tls.do_handshake)
        except ssl.SSLEOFError:
            sock.close()
            raise Failure("not accepted: ended before TLS began") from None
        except BaseException:
            sock.close()
            raise
        return stream

    async def _until_done(self, step: Callable[[], object]) -> object:
        while True:
            try:
                done = step()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._more()
            else:
                await self._flush()
                return done

    async def _flush(self) -> None:
        if data := self.outgoing.read():
            await self.loop.sock_sendall(self.sock, data)

    async def _more(self) -> None:
        if data := await self.loop.sock_recv(self.sock, CHUNK):
            self.incoming.write(data)
        elif self.incoming.eof:
            raise Failure("ended without TLS's end")
        else:
            self.incoming.write_eof()

    async def read(self) -> bytes:
        """What comes next; nothing at a clean end."""
        try:
            return await self._until_done(lambda: self.tls.read(CHUNK))
        except ssl.SSLZeroReturnError:
            return b""
        except ssl.SSLEOFError:
            raise Failure("ended without TLS's end") from None

    async def write(self, data: bytes) -> None:
        await self._until_done(lambda: self.tls.write(data))

    async def end(self) -> None:
        """Ends this direction; the other goes on."""
        try:
            self.tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        await self._flush()

    def close(self) -> None:
        self.sock.close()


class Client:
    def __init__(self, ca: str, cert: str, key: str) -> None:
        self.context = ssl.create_default_context(cafile=ca)
        self.context.load_cert_chain(cert, key)
        self.random = random.Random(1)
        self.tasks: set[asyncio.Task[None]] = set()
        self.load: asyncio.Task[None] | None = None
        # Of the streams that begin now. Others have their own: what hears of its end late must hear of it all the same.
        self.ending = asyncio.Event()
        self.begun, self.ended, self.under_way = 0, 0, 0

    async def run(self) -> None:
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := (await reader.readline()).decode():
            match line.split():
                case ["rate", address, rate, *nodes]:
                    if self.load:
                        self.load.cancel()
                    self.load = asyncio.create_task(self._load(address, float(rate), nodes)) if float(rate) else None
                case ["streams", count, address, *nodes]:
                    for number in range(int(count)):
                        self._spawn(self._stream_again(address, nodes[number % len(nodes)], self.ending))
                case ["end-streams"]:
                    self.ending.set()
                    self.ending = asyncio.Event()
                case ["once", tag, address, node]:
                    self._spawn(self._short(self._begin("get", node, address, tag)))
                case ["hold", tag, address, node]:
                    self._spawn(self._stream(self._begin("echo", node, address, tag), self.ending))
                case ["count", tag]:
                    self._count(tag)
                case words:
                    sys.exit(f"there is no command {words}")
        if self.load:
            self.load.cancel()
        self.ending.set()
        while self.tasks:
            await asyncio.wait(self.tasks)
        self._count("end")

    def _count(self, tag: str) -> None:
        say(Count(tag, self.begun, self.ended, self.under_way))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _load(self, address: str, rate: float, nodes: list[str]) -> None:
        """Whether or not those before have ended: what hangs must not make it quiet."""
        due = time.monotonic()
        while True:
            due += self.random.expovariate(rate)
            await asyncio.sleep(max(0, due - time.monotonic()))
            kind = self.random.choices(["get", "put"], [4, 1])[0]
            self._spawn(self._short(self._begin(kind, self.random.choice(nodes), address)))

    async def _stream_again(self, address: str, node: str, ending: asyncio.Event) -> None:
        while not ending.is_set():
            await self._stream(self._begin("echo", node, address), ending)
            await asyncio.sleep(0.5)

    def _begin(self, kind: str, node: str, address: str, tag: str = "") -> Outcome:
        """Whatever has begun here ends in `_judge`."""
        outcome = Outcome(kind, node, address, time.time(), tag)
        self.begun += 1
        self.under_way += outcome.of_load
        return outcome

    async def _stream(self, outcome: Outcome, ending: asyncio.Event) -> None:
        await self._judge(outcome, lambda outcome: self._echo(outcome, ending))

    async def _short(self, outcome: Outcome) -> None:
        # Mostly small; now and then more than is sent at once, so that faults hit the middle of something.
        size = self.random.choice([256, 1024, 4096] * 4 + [65536])
        number = self.random.getrandbits(48)

        async def within(outcome: Outcome) -> None:
            async with asyncio.timeout(DEADLINE):
                await (self._get if outcome.kind == "get" else self._put)(outcome, size, number)
        await self._judge(outcome, within)

    async def _judge(self, outcome: Outcome, work: Callable[[Outcome], Awaitable[None]]) -> None:
        try:
            await work(outcome)
            outcome.result = "delivered"
        except Wrong as error:
            outcome.result, outcome.why = "WRONG", str(error)
        except TimeoutError as error:
            # The kernel's own, of a connection, is an OSError with a number, and loud.
            outcome.result, outcome.why = ("failed", "timed out") if error.errno else ("HUNG", "")
        except Failure as error:
            outcome.result, outcome.why = "failed", str(error)
        except ssl.SSLError as error:
            outcome.result, outcome.why = "failed", f"TLS: {error.reason}"
        except OSError as error:
            outcome.result, outcome.why = "failed", error.strerror or repr(error)
        except Exception as error:  # What cannot even be read is no answer to this request.
            outcome.result, outcome.why = "WRONG", repr(error)
        outcome.ended = time.time()
        self.ended += 1
        self.under_way -= outcome.of_load
        say(outcome)

    async def _opened(self, outcome: Outcome) -> tuple[Stream, bytes]:
        """A tunnel to the node, and what has come already of what it carries."""
        host, _, port = outcome.address.rpartition(":")
        stream = await Stream.connect(self.context, host, int(port))
        try:
            there = f"{outcome.node}:{PORT}"
            await stream.write(f"CONNECT {there} HTTP/1.1\r\nHost: {there}\r\n\r\n".encode())
            head = b""
            while b"\r\n\r\n" not in head:
                more = await stream.read()
                if not more:
                    raise Failure("ended before an answer")
                head += more
                if len(head) > HEAD:
                    raise Wrong("an endless head")
            outcome.answered = time.time()
            head, _, rest = head.partition(b"\r\n\r\n")
            version, status, *reason = head.split(b"\r\n")[0].decode().split(" ", 2)
            if version != "HTTP/1.1":
                raise Wrong(f"answered by {head[:80]!r}")
            if status != "200":
                raise Failure(f"{status} {' '.join(reason)}")
            return stream, rest
        except BaseException:
            stream.close()
            raise

    async def _get(self, outcome: Outcome, size: int, number: int) -> None:
        stream, rest = await self._opened(outcome)
        try:
            await stream.write(f"get {size} {number}\n".encode())
            got = await self._rest(stream, rest)
        finally:
            stream.close()
        wanted = f"{outcome.node}\n".encode() + body(outcome.node, number, size)
        if got != wanted:
            raise Wrong(f"{len(got)} bytes, {got[:40]!r}..., instead of {len(wanted)} bytes, {wanted[:40]!r}...")

    async def _put(self, outcome: Outcome, size: int, number: int) -> None:
        stream, rest = await self._opened(outcome)
        sent = body("client", number, size)
        try:
            await stream.write(f"put {size}\n".encode() + sent)
            await stream.end()
            got = await self._rest(stream, rest)
        finally:
            stream.close()
        wanted = f"{outcome.node}\n{hashlib.sha256(sent).hexdigest()}\n".encode()
        if got != wanted:
            raise Wrong(f"{got!r} instead of {wanted!r}")

    @staticmethod
    async def _rest(stream: Stream, rest: bytes) -> bytes:
        parts = [rest]
        while more := await stream.read():
            parts.append(more)
        # Politeness; what it meets is not part of the request any more.
        with contextlib.suppress(OSError):
            await stream.end()
        return b"".join(parts)

    async def _echo(self, outcome: Outcome, ending: asyncio.Event) -> None:
        """Each line must be back within the deadline. The last one tells the target that this end is meant."""
        async with asyncio.timeout(DEADLINE):
            stream, rest = await self._opened(outcome)
        try:
            await stream.write(b"echo\n")
            number = 0
            while True:
                last = ending.is_set()
                line = "end\n" if last else f"{number} {self.random.getrandbits(64):x}\n"
                async with asyncio.timeout(DEADLINE):
                    await stream.write(line.encode())
                    wanted = f"{outcome.node} {line}".encode()
                    while len(rest) < len(wanted):
                        more = await stream.read()
                        if not more:
                            raise Wrong(f"a clean end after {rest!r} instead of {wanted!r}")
                        rest += more
                    if rest != wanted:
                        raise Wrong(f"{rest!r} instead of {wanted!r}")
                    if last and (more := await stream.read()):
                        raise Wrong(f"{more!r} after the end")
                if last:
                    return
                rest, number = b"", number + 1
                await asyncio.sleep(PACE)
        finally:
            stream.close()


def say(what: Outcome | Count) -> None:
    sys.stdout.write(json.dumps(dataclasses.asdict(what)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["target", node, address, port]:
            asyncio.run(target(node, address, int(port)))
        case ["client", ca, cert, key]:
            asyncio.run(Client(ca, cert, key).run())
        case _:
            sys.exit(__doc__)
