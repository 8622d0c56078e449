"""A very small client of the Kubernetes API for the few calls that bringing a cluster up needs.

Owns requests with a client certificate. Knows no object: paths and bodies come from the caller.
"""

import base64
import http.client
import json
import ssl
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from devcluster.errors import ClusterError

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
FIELD_MANAGER = "devcluster"


class ApiError(ClusterError):
    """The API server's refusal, with its status code and its own sentence."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class Api:
    """One API server, reached with the certificate of a kubeconfig."""

    def __init__(self, kubeconfig: dict[str, Any], timeout_s: float = 10.0) -> None:
        cluster = kubeconfig["clusters"][0]["cluster"]
        user = kubeconfig["users"][0]["user"]
        self.address = urlsplit(cluster["server"])
        self.timeout_s = timeout_s
        self.tls = ssl.create_default_context(cadata=decoded(cluster["certificate-authority-data"]).decode())
        # The ssl module takes certificates from files alone.
        with tempfile.NamedTemporaryFile() as pair:
            pair.write(decoded(user["client-certificate-data"]) + b"\n" + decoded(user["client-key-data"]))
            pair.flush()
            self.tls.load_cert_chain(pair.name)

    def request(self, method: str, path: str, body: object = None, content: str = "application/json") -> Any:
        """Return the decoded answer; an answer that is not JSON comes back as text."""
        connection = http.client.HTTPSConnection(
            self.address.hostname or "", self.address.port, timeout=self.timeout_s, context=self.tls
        )
        try:
            headers = {"Content-Type": content, "Accept": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException) as problem:
            raise ApiError(0, f"The API server does not answer {method} {path}: {problem}") from problem
        finally:
            connection.close()
        decoded_text: Any = json.loads(text) if text.startswith("{") else text
        if answer.status >= 400:
            sentence = decoded_text.get("message", text) if isinstance(decoded_text, dict) else text
            raise ApiError(answer.status, f"{method} {path}: {sentence}")
        return decoded_text

    def get(self, path: str) -> Any:
        return self.request("GET", path)

    def apply(self, path: str, manifest: dict[str, Any]) -> Any:
        """Apply on the server's side, taking over fields that somebody else had set."""
        return self.request("PATCH", f"{path}?fieldManager={FIELD_MANAGER}&force=true", manifest, APPLY)

    def merge(self, path: str, patch: dict[str, Any]) -> Any:
        return self.request("PATCH", path, patch, MERGE)

    def delete(self, path: str) -> Any:
        return self.request("DELETE", path)

    def is_ready(self) -> bool:
        try:
            return bool(self.get("/readyz") == "ok")
        except ApiError:
            return False

    def exists(self, path: str) -> bool:
        try:
            self.get(path)
        except ApiError:
            return False
        return True


def open_api(kubeconfig: Path, timeout_s: float = 10.0) -> Api:
    """Open a kubeconfig that this program wrote (JSON, certificates inside)."""
    return Api(json.loads(kubeconfig.read_text()), timeout_s)


def decoded(text: str) -> bytes:
    return base64.b64decode(text)
