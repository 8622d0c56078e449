"""Certificates and kubeconfigs of one cluster, made with the openssl program.

Owns who exists in the cluster's control plane and what their certificates say. Does not know what runs.
"""

import base64
import json
import ssl
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from devcluster.errors import ClusterError

DAYS = "3650"
CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Identity:
    """A certificate: file name, subject, and extensions beyond those of every client."""

    name: str
    subject: str
    extensions: str = "extendedKeyUsage=clientAuth"


CLIENTS = (
    Identity("admin", "/O=system:masters/CN=admin"),
    Identity("controller-manager", "/CN=system:kube-controller-manager"),
    Identity("scheduler", "/CN=system:kube-scheduler"),
    Identity("proxy", "/CN=system:kube-proxy"),
    Identity("kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client"),
    Identity("coredns", "/O=system:masters/CN=coredns"),
)


def kubelet(node: str, name: str = "kubelet") -> Identity:
    return Identity(name, f"/O=system:nodes/CN=system:node:{node}")


def server(addresses: Sequence[str]) -> Identity:
    """Return the API server's certificate for these addresses and for its names inside the cluster."""
    names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost")
    alternatives = [f"IP:{address}" for address in addresses] + [f"DNS:{name}" for name in names]
    return Identity(
        "apiserver", "/CN=kube-apiserver", f"extendedKeyUsage=serverAuth\nsubjectAltName={','.join(alternatives)}"
    )


def make(folder: Path, identities: Sequence[Identity]) -> None:
    """Make the authority, the key of service account tokens, and every certificate that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (folder / "ca.crt").exists():
        openssl(
            folder, "req", "-x509", *CURVE, "-keyout", "ca.key", "-out", "ca.crt", "-days", DAYS,
            "-subj", "/CN=gpumeter-local-cluster", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip
        openssl(folder, "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", "sa.key")
        openssl(folder, "pkey", "-in", "sa.key", "-pubout", "-out", "sa.pub")
    for identity in identities:
        if not (folder / f"{identity.name}.crt").exists():
            sign(folder, identity)


def sign(folder: Path, identity: Identity) -> None:
    name = identity.name
    extensions = folder / f"{name}.ext"
    # Python 3.13 and newer refuse a certificate that does not name its authority's key.
    extensions.write_text(f"authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n{identity.extensions}\n")
    openssl(folder, "req", "-new", *CURVE, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", identity.subject)
    openssl(
        folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
        "-days", DAYS, "-extfile", extensions.name, "-out", f"{name}.crt",
    )  # fmt: skip


def openssl(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"openssl could not {arguments[0]}: {done.stderr.strip().splitlines()[-1:]}")


def write_kubeconfig(path: Path, folder: Path, identity: str, url: str, context: str) -> None:
    """Write a kubeconfig (JSON is YAML, too) that holds its certificates, readable by its owner alone."""
    path.touch(mode=0o600)
    path.write_text(json.dumps(kubeconfig(folder, identity, url, context), indent=1) + "\n")


def kubeconfig(folder: Path, identity: str, url: str, context: str) -> dict[str, object]:
    def data(file: str) -> str:
        return base64.b64encode((folder / file).read_bytes()).decode()

    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": context, "cluster": {"server": url, "certificate-authority-data": data("ca.crt")}}],
        "users": [
            {
                "name": context,
                "user": {
                    "client-certificate-data": data(f"{identity}.crt"),
                    "client-key-data": data(f"{identity}.key"),
                },
            }
        ],
        "contexts": [{"name": context, "context": {"cluster": context, "user": context}}],
        "current-context": context,
    }


def tls_context(folder: Path) -> ssl.SSLContext:
    """Return what a client without a certificate needs to trust the cluster's servers."""
    return ssl.create_default_context(cafile=folder / "ca.crt")
