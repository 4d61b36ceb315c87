"""kubectl as a person uses it: a version and a protocol, commands that end, commands that go on, and a terminal."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

from lab import Failed, check

# Which setting makes which kubectl use WebSockets; without it, or with false, it speaks SPDY.
WEBSOCKETS = ("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "KUBECTL_PORT_FORWARD_WEBSOCKETS")


class Kubectl:
    """One version of kubectl, with one protocol for exec, attach, cp and port-forward."""

    def __init__(self, cloud, binary, version, websockets):
        self.cloud, self.binary, self.version, self.websockets = cloud, binary, version, websockets
        self.env = {name: "true" if websockets else "false" for name in WEBSOCKETS}
        self.env["KUBECONFIG"] = "/etc/kubernetes/admin.conf"

    def __str__(self):
        return f"kubectl {self.version}, {'WebSocket' if self.websockets else 'SPDY'}"

    def run(self, *arguments, stdin=None, seconds=60):
        """Exit code, stdout, stderr."""
        return self.cloud.run(self.binary, *arguments, stdin=stdin, seconds=seconds, env=self.env)

    def do(self, *arguments, stdin=None, seconds=60):
        code, out, err = self.run(*arguments, stdin=stdin, seconds=seconds)
        if code != 0:
            raise Failed(f"kubectl {' '.join(arguments)}: exit code {code}: {err.strip()[-600:]}")
        return out

    def follow(self, *arguments, stdin=None):
        """A command that goes on running."""
        return Following(self.cloud.argv(self.binary, *arguments), {**os.environ, **self.env}, stdin)

    def terminal(self, *arguments):
        return Terminal(self.cloud.argv(self.binary, *arguments), {**os.environ, **self.env})

    def forward(self, pod, port):
        """A port-forward, and the local port that it chose."""
        running = self.follow("port-forward", pod, f":{port}")
        line = running.line(15, lambda line: line.startswith("Forwarding from 127.0.0.1"))
        return running, int(re.search(r"127\.0\.0\.1:(\d+)", line).group(1))


class Following:
    """A running command whose lines are read as they come. Ended when the `with` block is left."""

    def __init__(self, argv, env, stdin=None):
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        self.rest = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end(signal.SIGKILL)

    def more(self, seconds, size=65536):
        """What comes next; nothing at the end of the output."""
        ready, _, _ = select.select([self.process.stdout], [], [], max(0, seconds))
        if not ready:
            raise Failed(f"kubectl printed nothing for {seconds:.1f} s")
        return os.read(self.process.stdout.fileno(), size)

    def line(self, seconds, wanted=lambda line: True):
        """The next line that is wanted."""
        deadline = time.monotonic() + seconds
        while True:
            while b"\n" not in self.rest:
                more = self.more(deadline - time.monotonic())
                if not more:
                    raise Failed(f"kubectl has ended: {self.process.stderr.read().decode(errors='replace')[-600:]}")
                self.rest += more
            line, self.rest = self.rest.split(b"\n", 1)
            if wanted(line.decode(errors="replace")):
                return line.decode(errors="replace")

    def send(self, text):
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def end(self, number=signal.SIGINT, seconds=10):
        """Ends it as Ctrl-C does. Its exit code and what it wrote to stderr."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds):
        try:
            _, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise AssertionError(f"kubectl did not end within {seconds} s") from None
        except ValueError:
            # Read to its end before.
            return self.process.wait(seconds), ""
        return self.process.returncode, err.decode(errors="replace")


class Terminal:
    """A command in a terminal of its own, which can be resized."""

    def __init__(self, argv, env):
        self.text = ""
        pid, self.screen = pty.fork()
        if pid == 0:
            os.execvpe(argv[0], argv, env)
        self.pid = pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.screen)

    def resize(self, rows, columns):
        fcntl.ioctl(self.screen, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text):
        os.write(self.screen, text.encode())

    def expect(self, pattern, seconds=10):
        """Waits until the screen shows what is asked for, after what was shown before."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            ready, _, _ = select.select([self.screen], [], [], max(0, deadline - time.monotonic()))
            check(ready, f"the terminal did not show {pattern!r} within {seconds} s, but {self.text[-300:]!r}")
            try:
                more = os.read(self.screen, 65536)
            except OSError:
                more = b""
            check(more, f"the terminal's command ended before it showed {pattern!r}: {self.text[-300:]!r}")
            self.text += more.decode(errors="replace")
        self.text = self.text[found.end():]
        return found

    def exit_code(self, seconds=10):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self.screen], [], [], 0.1)
            try:
                if ready and not os.read(self.screen, 65536):
                    ready = False
            except OSError:
                pass
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"the terminal's command did not end within {seconds} s")
