"""oci://: a model in a container registry, as an artifact (ORAS, ModelPack, KitOps) or in the layers of an image.

Owns what the manifest's layers mean and that every blob is what its digest says. The protocol is oras' business; its
retries are not used, because `fetch` retries, and knows what is worth it. Registry credentials come from a docker
config: $DOCKER_CONFIG/config.json, or .dockerconfigjson as a mounted Secret names it.
"""

import base64
import hashlib
import json
import platform
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import requests
from oras.auth import AuthenticationException
from oras.provider import Registry as OrasRegistry

from gpumeter_worker.failure import MODEL_ACCESS_DENIED, MODEL_INVALID, MODEL_NOT_FOUND, StartupFailed, first_line
from gpumeter_worker.sources.location import Location
from gpumeter_worker.sources.progress import Progress
from gpumeter_worker.sources.remote import Damaged, RemoteFile, Snapshot, Unreachable
from gpumeter_worker.sources.wanted import wanted

T = TypeVar("T")

_CONNECT_S, _READ_S = 10.0, 60.0
_CHUNK_BYTES = 2**20
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    *_INDEXES,
)
_NAMES = ("org.cncf.model.filepath", "org.cnai.model.filepath", "org.opencontainers.image.title")
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
_UNPACKED = "unpacked"
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_DOCKER_HUB_KEY = "https://index.docker.io/v1/"
"""Under this key `docker login` writes what it was given for Docker Hub, whatever the Hub's hosts are called."""


class Registry:
    """One reference in one registry."""

    def __init__(self, location: Location, environment: Mapping[str, str]) -> None:
        self.uri = location.uri
        self.revision = ""
        self.resumed = ""
        self._reference = location.uri.removeprefix("oci://")
        _, at, digest = self._reference.partition("@")
        self.pinned = digest if at else ""
        self._host = self._reference.partition("/")[0]
        self.allow_pickle = location.allow_pickle
        plain = {one.strip() for one in environment.get("GPUMETER_PLAIN_HTTP_REGISTRIES", "").split(",")}
        self._plain = self._host in plain or self._host.partition(":")[0] in ("localhost", "127.0.0.1")
        self._credentials = credentials(environment, self._host)
        self._made: _Client | None = None

    def look(self) -> Snapshot:
        """Fetch the manifest; its digest is the version."""
        manifest, digest = self._translated(self._manifest)
        layers = [_layer(one) for one in manifest.get("layers") or []]
        if not layers:
            raise StartupFailed(MODEL_INVALID, f"{self.uri} has no layers, so no model; push the model's files")
        raw = {name: layer for name, layer, unpack in layers if not unpack}
        names = set(wanted(raw, allow_pickle=self.allow_pickle))
        if all(not unpack for _, _, unpack in layers):
            if not names:
                raise StartupFailed(MODEL_NOT_FOUND, f"{self.uri} holds no file of a model; check what was pushed")
            files = tuple(
                RemoteFile(name, int(layer["size"]), layer["digest"])
                for name, layer in sorted(raw.items())
                if name in names
            )
            return Snapshot(digest, sum(file.size for file in files), files)
        size = sum(int(layer["size"]) for name, layer, unpack in layers if unpack or name in names)
        return Snapshot(digest, size, ())

    def copy(self, snapshot: Snapshot, folder: Path, progress: Progress) -> None:
        """Layer by layer, in the manifest's order: a later layer of an image replaces files of an earlier one."""
        manifest, digest = self._translated(partial(self._manifest, snapshot.version))
        if digest != snapshot.version:
            raise Damaged(f"the manifest of {self.uri} has the digest {digest} instead of {snapshot.version}")
        layers = [_layer(one) for one in manifest.get("layers") or []]
        archives = any(unpack for _, _, unpack in layers)
        into = folder / _UNPACKED if archives else folder
        if archives:  # half of an earlier try's archives cannot be told from what is in the image
            shutil.rmtree(into, ignore_errors=True)
            into.mkdir()
        keep = set(wanted((name for name, _, unpack in layers if not unpack), allow_pickle=self.allow_pickle))
        for name, layer, unpack in layers:
            if unpack:
                self._translated(partial(self._unpack, layer, into, progress))
            elif name in keep:
                target = into / name
                if not (target.is_file() and target.stat().st_size == int(layer["size"])):
                    self._translated(partial(self._save, layer, target, progress))
        if archives:
            _lift(self.uri, into, folder, self.allow_pickle)

    def elsewhere(self) -> None:
        """Nobody else keeps copies."""
        return None

    def _manifest(self, digest: str = "") -> tuple[dict[str, Any], str]:
        """The manifest of this machine's platform and its digest."""
        name = self._reference.partition("@")[0]
        body = self._get_manifest(f"{name}@{digest}" if digest else self._reference)
        manifest = json.loads(body)
        if manifest.get("mediaType") in _INDEXES or "manifests" in manifest:
            chosen = _of_this_machine(manifest.get("manifests") or [])
            if chosen is None:
                raise StartupFailed(MODEL_INVALID, f"{self.uri} is an empty index; push a manifest")
            body = self._get_manifest(f"{name}@{chosen}")
            manifest = json.loads(body)
        return manifest, f"sha256:{hashlib.sha256(body).hexdigest()}"

    def _get_manifest(self, reference: str) -> bytes:
        client = self._client()
        container = client.get_container(reference)
        url = f"{client.prefix}://{container.manifest_url()}"
        response = client.do_request(url, "GET", headers={"Accept": ", ".join(_MANIFESTS)})
        response.raise_for_status()
        body: bytes = response.content
        _, at, digest = reference.partition("@")
        if at and hashlib.sha256(body).hexdigest() != digest.removeprefix("sha256:"):
            raise Damaged(f"the manifest of {self.uri} is not what its digest says; try again or push it anew")
        return body

    def _blob(self, layer: Mapping[str, Any], progress: Progress) -> "_Blob":
        client = self._client()
        response = client.get_blob(self._reference, layer["digest"], stream=True)
        response.raise_for_status()
        return _Blob(response, layer["digest"], progress)

    def _save(self, layer: Mapping[str, Any], target: Path, progress: Progress) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(target.name + ".incomplete")
        blob = self._blob(layer, progress)
        with unfinished.open("wb") as file:
            for chunk in blob.chunks():
                file.write(chunk)
        blob.check(self.uri)
        unfinished.rename(target)

    def _unpack(self, layer: Mapping[str, Any], folder: Path, progress: Progress) -> None:
        """What was unpacked of a layer that then proves damaged is discarded with the whole folder."""
        if str(layer.get("mediaType", "")).endswith("zstd"):
            raise StartupFailed(
                MODEL_INVALID, f"a layer of {self.uri} is compressed with zstd, which is not read; push it with gzip"
            )
        blob = self._blob(layer, progress)
        try:
            own: set[Path] = set()
            with tarfile.open(fileobj=cast(Any, blob), mode="r|*") as archive:
                for member in archive:
                    _extract(self.uri, archive, member, folder, own)
            blob.drain()
        except (tarfile.TarError, EOFError) as error:
            raise Damaged(f"a layer of {self.uri} is no whole archive ({first_line(error)}); push it again") from None
        blob.check(self.uri)

    def _client(self) -> "_Client":
        if self._made is None:
            self._made = _Client(self._host, self._plain, self._credentials)
        return self._made

    def _translated(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except requests.HTTPError as error:
            raise self._refused(error.response.status_code) from None
        except AuthenticationException:
            raise self._refused(401) from None
        except json.JSONDecodeError:
            raise Damaged(f"{self._host} did not answer with a manifest for {self.uri}; is it a registry?") from None
        except (requests.RequestException, ConnectionError) as error:
            raise Unreachable(
                f"{self._host} cannot be reached for {self.uri} ({first_line(error)}); check the network and "
                "the registry's name"
            ) from None

    def _refused(self, status: int) -> StartupFailed:
        if status in (401, 403):
            given = "those of the docker config are refused" if self._credentials else "no credentials were given"
            return StartupFailed(
                MODEL_ACCESS_DENIED,
                f"{self._host} does not let this worker read {self.uri} ({given}, status {status}); mount a docker "
                "config that may pull it and name its folder in DOCKER_CONFIG, in spec.template",
            )
        if status == 404:
            return StartupFailed(MODEL_NOT_FOUND, f"{self._host} has no {self.uri}; correct spec.model.uri")
        return Unreachable(f"{self._host} answered {status} for {self.uri}; try again later")


class _Client(OrasRegistry):  # type: ignore[misc]
    """oras' client without its retries, with a limit on silence, and with the credentials that were found for it."""

    def __init__(self, host: str, plain: bool, credentials: tuple[str, str] | None) -> None:
        kind = _kind_of_authentication(f"{'http' if plain else 'https'}://{host}/v2/")
        if kind == "basic" and credentials is None:
            raise AuthenticationException(f"{host} wants a name and a password")
        super().__init__(host, insecure=plain, auth_backend=kind)
        self.session = _Session()
        self.auth.session = self.session
        if credentials is not None:
            self.auth.set_basic_auth(*credentials)

    def do_request(self, *arguments: Any, **named: Any) -> requests.Response:
        """One try."""
        try:
            response: requests.Response = OrasRegistry.do_request.__wrapped__(self, *arguments, **named)
        except requests.RequestException:
            raise
        except ValueError as error:  # it finds no way to answer a challenge
            raise AuthenticationException(str(error)) from None
        return response


class _Session(requests.Session):  # type: ignore[misc]
    """Every request has a timeout: a registry that goes silent must not hold a start for ever."""

    def request(self, *arguments: Any, **named: Any) -> requests.Response:
        named.setdefault("timeout", (_CONNECT_S, _READ_S))
        return super().request(*arguments, **named)


class _Blob:
    """A blob as it arrives: a stream that a tar archive can be read from, hashed on the way."""

    def __init__(self, response: requests.Response, digest: str, progress: Progress) -> None:
        self._chunks: Iterator[bytes] = response.iter_content(_CHUNK_BYTES)
        self._expected = digest
        self._hash = hashlib.sha256()
        self._progress = progress
        self._held = b""

    def chunks(self) -> Iterator[bytes]:
        """All of it."""
        for chunk in self._chunks:
            self._hash.update(chunk)
            self._progress.advance(len(chunk))
            yield chunk

    def read(self, count: int) -> bytes:
        """The next bytes, fewer only at the end."""
        parts, missing = [], count
        while missing:
            if not self._held:
                self._held = next(self.chunks(), b"")
            if not self._held:
                break
            parts.append(self._held[:missing])
            self._held = self._held[missing:]
            missing -= len(parts[-1])
        return b"".join(parts)

    def drain(self) -> None:
        """Read what follows the archive's end, for the digest covers it too."""
        for _ in self.chunks():
            pass

    def check(self, uri: str) -> None:
        """Raises Damaged when this was not the blob that the manifest names."""
        found = f"sha256:{self._hash.hexdigest()}"
        if found != self._expected:
            raise Damaged(f"a layer of {uri} arrived with the digest {found} instead of {self._expected}; try again")


def credentials(environment: Mapping[str, str], host: str) -> tuple[str, str] | None:
    """Name and password for a registry from a docker config, or None. Raises StartupFailed when it cannot be read."""
    folder = Path(environment.get("DOCKER_CONFIG") or Path(environment.get("HOME") or "/") / ".docker")
    for file in (folder / "config.json", folder / ".dockerconfigjson"):
        try:
            entries = json.loads(file.read_text()).get("auths") or {}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise StartupFailed(
                MODEL_ACCESS_DENIED,
                f"the docker config {file} cannot be read ({first_line(error)}); correct the Secret",
            ) from None
        for key in _keys(host):
            if entry := entries.get(key):
                return _of_entry(entry, file, key)
    return None


def _keys(host: str) -> tuple[str, ...]:
    """What an entry for a registry may be called, as docker and podman write it."""
    own = (host, f"https://{host}", f"http://{host}", f"https://{host}/v1/", f"https://{host}/v2/")
    domain = (urlsplit(_DOCKER_HUB_KEY).hostname or "").partition(".")[2]
    return (*own, _DOCKER_HUB_KEY) if host == domain or host.endswith(f".{domain}") else own


def _of_entry(entry: object, file: Path, key: str) -> tuple[str, str] | None:
    try:
        if not isinstance(entry, dict):
            raise ValueError("it is no object")
        if entry.get("auth"):
            name, colon, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
            if not colon:
                raise ValueError("its auth holds no colon between name and password")
            return name, password
        return (str(entry["username"]), str(entry.get("password", ""))) if entry.get("username") else None
    except (ValueError, TypeError) as error:  # of base64 or of UTF-8; their texts may quote the password
        why = first_line(error) if type(error) is ValueError else "its auth is not base64 of name:password"
        raise StartupFailed(
            MODEL_ACCESS_DENIED,
            f"the entry {key} of the docker config {file} cannot be used ({why}); log in again, or correct the Secret",
        ) from None


def _kind_of_authentication(url: str) -> str:
    """What a registry asks for: a token (the default), or a name and a password with every request."""
    challenge = _Session().get(url).headers.get("Www-Authenticate", "")
    return "basic" if challenge.lower().startswith("basic") else "token"


def _layer(layer: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], bool]:
    """A layer's file name ("" where it has none), the layer, and whether it is an archive of files."""
    notes = layer.get("annotations") or {}
    name = next((notes[key] for key in _NAMES if notes.get(key)), "")
    media = str(layer.get("mediaType", ""))
    packed = ".tar" in media or notes.get("io.deis.oras.content.unpack") == "true"
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or ".." in path.parts
    return ("" if unsafe else name), layer, packed


def _of_this_machine(manifests: list[Mapping[str, Any]]) -> str | None:
    machine = _MACHINES.get(platform.machine(), platform.machine())
    fitting = [one for one in manifests if (one.get("platform") or {}).get("architecture") == machine]
    chosen = next(iter(fitting or manifests), None)
    return str(chosen["digest"]) if chosen else None


def _extract(uri: str, archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, own: set[Path]) -> None:
    """Write what a member of a layer says. `own` are the files of this layer so far: it takes back others' only."""
    path = PurePosixPath(member.name)
    if path.name.startswith(_WHITEOUT):
        _take_back(path, folder, own)
        return
    if not wanted([path.name], allow_pickle=True):
        return
    if member.issym() or member.islnk():
        raise StartupFailed(
            MODEL_INVALID, f"{member.name} in {uri} is a link, which is not followed; push the file itself"
        )
    if member.isfile():
        try:
            archive.extract(member, folder, filter="data")
            own.add((folder / path).resolve())
        except tarfile.FilterError as error:
            raise StartupFailed(MODEL_INVALID, f"{uri} holds a file outside of itself ({first_line(error)})") from None


def _take_back(path: PurePosixPath, folder: Path, own: set[Path]) -> None:
    """A whiteout: an image's way to say that a file or a folder of an earlier layer is gone, or all in a folder.

    https://github.com/opencontainers/image-spec/blob/main/layer.md#whiteouts
    """
    gone = folder / path.parent
    if path.name != _OPAQUE:
        name = path.name.removeprefix(_WHITEOUT)
        if name in ("", ".", ".."):
            return
        gone /= name
    if not gone.resolve().is_relative_to(folder.resolve()):
        return
    for file in (gone, *gone.rglob("*")):
        if not file.is_dir() and file.resolve() not in own:
            file.unlink(missing_ok=True)


def _lift(uri: str, unpacked: Path, folder: Path, allow_pickle: bool) -> None:
    """Move the model's files from wherever they were in the layers to the folder, and drop the rest."""
    found_at = {file.parent for file in unpacked.rglob("config.json")}
    roots = sorted(found_at, key=lambda root: (len(root.parts), str(root)))
    if not roots:
        raise StartupFailed(MODEL_INVALID, f"{uri} holds no config.json, so no model; check what was pushed")
    if len(roots) > 1 and len(roots[0].parts) == len(roots[1].parts):
        names = " and ".join(str(root.relative_to(unpacked)) for root in roots[:2])
        raise StartupFailed(MODEL_INVALID, f"{uri} holds several models ({names}); push one an image")
    root = roots[0]
    found = [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]
    keep = wanted(found, allow_pickle=allow_pickle)
    for name in keep:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (root / name).replace(target)
    shutil.rmtree(unpacked)
