"""The peers' programs, built from what `peers/` pins, once, and kept in the cache.

`build` is called by __main__.py before the namespaces are entered, which have no network. What cannot be had is not an
end: its reason is in the table. Nothing is ever written into the checkout.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent / "peers"
# Of one build, in seconds: Konnectivity's first takes some minutes on two slow cores.
LIMIT = 1800


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a peer comes from: a folder of `peers/`, with the file and the line that pin its version."""

    pin: str
    version: str
    programs: tuple[str, ...]


SOURCES = {
    "konnectivity": Source("go.mod", r"^\s+sigs\.k8s\.io/apiserver-network-proxy (\S+)", ("server", "agent")),
    "frp": Source("go.mod", r"^\s+github\.com/fatedier/frp (\S+)", ("frps", "frpc")),
    "chisel": Source("go.mod", r"^\s+github\.com/jpillora/chisel (\S+)", ("chisel",)),
    "rathole": Source("Cargo.toml", r'^rathole = \{ version = "=([^"]+)"', ("rathole",)),
}


@dataclasses.dataclass(frozen=True)
class Peer:
    """What was built, or why it could not be."""

    version: str
    folder: str
    missing: str = ""

    def program(self, name: str) -> Path:
        return Path(self.folder) / name


def build(names: Iterable[str]) -> dict[str, Peer]:
    """Those of `SOURCES`, from the cache where they are there already."""
    found = {}
    for name in names:
        source = SOURCES[name]
        version = re.search(source.version, (HERE / name / source.pin).read_text(), re.MULTILINE)[1]
        folder = cache() / f"{name}-{version}-{_digest(HERE / name)}"
        why = ""
        with _alone(folder):
            if not all((folder / program).exists() for program in source.programs):
                print(f"==> building {name} {version}", flush=True)
                why = _build(name, folder)
        if why:
            print(f"    it could not be built: {why}", flush=True)
        found[name] = Peer(version, str(folder), why)
    return found


def cache() -> Path:
    """Where all of it is kept."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edge-tunnel"
    return Path(os.environ.get("EDGE_TUNNEL_CACHE") or own) / "compare"


def _digest(folder: Path) -> str:
    """Of all that pins a peer: another pin, another build."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "target" not in path.parts):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While another run builds the same, this one waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(name: str, folder: Path) -> str:
    """Gives why it failed, or nothing."""
    with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=cache()) as work:
        out = Path(work) / "out"
        out.mkdir()
        why = _build_rust(name, out, Path(work)) if SOURCES[name].pin == "Cargo.toml" else _build_go(name, out)
        if not why:
            shutil.rmtree(folder, ignore_errors=True)
            out.rename(folder)
        return why


def _build_go(name: str, out: Path) -> str:
    """All programs that the module names as its tools."""
    if not shutil.which("go"):
        return "needs Go, to be built: https://go.dev/doc/install"
    flags = f"{os.environ.get('GOFLAGS', '')} -modcacherw".strip()
    environment = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": flags,
                   "GOCACHE": str(cache() / "go-build"), "GOMODCACHE": str(cache() / "go-modules")}
    words = ["go", "build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", f"{out}/"]
    return _run([*words, "tool"], HERE / name, environment)


def _build_rust(name: str, out: Path, work: Path) -> str:
    if why := _install_openssl():
        return why
    words = ["cargo", "build", "--quiet", "--release", "--locked"]
    why = _run(words, HERE / name, {"CARGO_TARGET_DIR": str(work / "target")})
    if not why:
        for program in SOURCES[name].programs:
            shutil.copy(work / "target" / "release" / program, out)
    return why


def _install_openssl() -> str:
    """What rathole's TLS is linked with."""
    if subprocess.run(["dpkg", "-s", "libssl-dev", "pkg-config"], capture_output=True).returncode == 0:
        return ""
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    packages = ["libssl-dev", "pkg-config"]
    return _run(["apt-get", "update", "-qq"], HERE, environment) or _run(
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages], HERE, environment)


def _run(words: list[str], folder: Path, environment: dict[str, str]) -> str:
    try:
        done = subprocess.run(words, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
                              errors="replace", stdin=subprocess.DEVNULL, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"{words[0]} {words[1]} was not done in {LIMIT} s"
    except FileNotFoundError:
        return f"there is no {words[0]} here"
    if done.returncode == 0:
        return ""
    # Of what a compiler says, the errors come first; of what a downloader says, the last line tells most.
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it says nothing"]
    said = next((line for line in lines if line.startswith("error")), lines[-1])
    return f"{words[0]} {words[1]}: exit code {done.returncode}: {said[:300]}"
