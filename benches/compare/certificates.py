"""What all systems prove themselves by: one CA, a certificate for each side. ECDSA P-256, made anew for each run."""

import dataclasses
import subprocess
from collections.abc import Iterable
from pathlib import Path

# The node of the edge, which its certificate names as a kubelet's own does.
NODE = "edge-a"
CLIENT = "kube-apiserver"
PASSWORD = "compare"
SUBJECTS = {"gateway": "/CN=gateway", "far": "/CN=far", "client": f"/CN={CLIENT}",
            NODE: f"/O=system:nodes/CN=system:node:{NODE}"}


@dataclasses.dataclass(frozen=True)
class Credentials:
    """The files of one side, in the forms that programs want."""

    cert: Path
    key: Path
    both: Path
    """Certificate and key in one file, for haproxy."""
    pkcs12: Path
    """The same for rathole."""


class Certificates:
    """`gateway` is who listens at the near end, `far` who does at the other, `client` who drives the load."""

    def __init__(self, folder: Path, addresses: Iterable[str]) -> None:
        self.folder = folder
        folder.mkdir()
        self.ca = folder / "ca.crt"
        self._openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                      "-subj", "/CN=compare", "-addext", "basicConstraints=critical,CA:TRUE",
                      "-addext", "keyUsage=critical,keyCertSign", "-keyout", "ca.key", "-out", "ca.crt")
        self._addresses = sorted({"127.0.0.1", *addresses})
        self.gateway, self.far = self._issue("gateway"), self._issue("far")
        self.client, self.node = self._issue("client"), self._issue(NODE)

    def _issue(self, name: str) -> Credentials:
        names = [f"DNS:{name}", *(f"IP:{address}" for address in self._addresses)]
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"basicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth,clientAuth\n"
                              f"subjectAltName={','.join(names)}\n")
        self._openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", SUBJECTS[name],
                      "-keyout", f"{name}.key", "-out", f"{name}.csr")
        self._openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
                      "-days", "2", "-extfile", extensions.name, "-out", f"{name}.crt")
        self._openssl("pkcs12", "-export", "-in", f"{name}.crt", "-inkey", f"{name}.key", "-certfile", "ca.crt",
                      "-passout", f"pass:{PASSWORD}", "-out", f"{name}.p12")
        cert, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        both = self.folder / f"{name}.pem"
        both.write_text(cert.read_text() + key.read_text())
        return Credentials(cert, key, both, self.folder / f"{name}.p12")

    def _openssl(self, *words: str) -> None:
        done = subprocess.run(["openssl", *words], cwd=self.folder, capture_output=True, text=True, timeout=30)
        if done.returncode != 0:
            raise RuntimeError(f"openssl {words[0]}: {done.stderr.strip()[-400:]}")
