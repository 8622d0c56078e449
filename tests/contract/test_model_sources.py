"""Each source of models against a real server of its protocol: what arrives, and what is refused how."""

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest

from gpumeter_worker.failure import StartupFailed
from gpumeter_worker.sources.fetch import Patience, fetch
from gpumeter_worker.sources.location import Location, local_path, remote
from gpumeter_worker.sources.oci import credentials
from gpumeter_worker.sources.progress import Progress
from rigs import modelservers
from rigs.modelservers import Layer, Server, manifest, tiny_model
from rigs.ports import hold_port

MODEL = tiny_model(300_000)
BESIDE = {"README.md": b"# a model", "pytorch_model.bin": b"pickle", "onnx/model.onnx": b"x", "train.py": b"import os"}
IMPATIENT = Patience(source_s=0.3, back_off_s=(0.05,), beat_s=0.1, stale_s=1.0, poll_s=0.05)


def fetched(uri: str, cache: Path, environment: dict[str, str], revision: str = "main", pickle: bool = False) -> Path:
    source = remote(Location(uri, revision, pickle), environment)
    return fetch(source, cache, "tester", Progress(), IMPATIENT)


def refused(uri: str, cache: Path, environment: dict[str, str], revision: str = "main") -> StartupFailed:
    with pytest.raises(StartupFailed) as failure:
        fetched(uri, cache, environment, revision)
    assert not list((cache / "models").glob("*.claim"))
    return failure.value


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".gpumeter.json"
    }


@pytest.fixture
def hub() -> Iterator[Server]:
    with modelservers.hub({"acme/tiny": MODEL | BESIDE, "acme/pickled": {"config.json": b"{}", **BESIDE}}) as server:
        yield server


def test_the_hub_gives_a_models_files_and_nothing_else(hub: Server, tmp_path: Path) -> None:
    folder = fetched("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url})
    assert contents(folder) == MODEL


def test_a_second_start_asks_the_hub_and_fetches_nothing(hub: Server, tmp_path: Path) -> None:
    first = fetched("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url})
    sent = hub.behaviour.sent.total()
    assert fetched("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url}) == first
    assert hub.behaviour.sent.total() == sent


def test_a_commit_that_is_in_the_cache_needs_no_hub(hub: Server, tmp_path: Path) -> None:
    first = fetched("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url}, modelservers.COMMIT)
    hub.behaviour.asked.clear()
    assert fetched("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url}, modelservers.COMMIT) == first
    assert not hub.behaviour.asked


def test_pickled_weights_are_fetched_only_when_allowed(hub: Server, tmp_path: Path) -> None:
    strict = fetched("hf://acme/pickled", tmp_path / "strict", {"HF_ENDPOINT": hub.url})
    assert set(contents(strict)) == {"config.json"}
    allowed = fetched("hf://acme/pickled", tmp_path / "allowed", {"HF_ENDPOINT": hub.url}, pickle=True)
    assert set(contents(allowed)) == {"config.json", "pytorch_model.bin"}


def test_a_name_that_the_hub_does_not_know_is_not_found(hub: Server, tmp_path: Path) -> None:
    failure = refused("hf://acme/nothing", tmp_path, {"HF_ENDPOINT": hub.url})
    assert failure.line.startswith(f"ModelNotFound: {hub.url} has no acme/nothing, or it is private")
    failure = refused("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url}, "v9")
    assert failure.line == "ModelNotFound: acme/tiny has no revision v9; correct spec.model.revision"


def test_a_gated_repository_needs_its_token(hub: Server, tmp_path: Path) -> None:
    hub.behaviour.token = "hf_right"
    for environment in ({}, {"HF_TOKEN": "hf_wrong"}):
        failure = refused("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url, **environment})
        assert failure.reason == "ModelAccessDenied"
        assert "HF_TOKEN" in failure.message
        assert "hf_wrong" not in failure.message
    assert contents(fetched("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_right"})) == MODEL


def test_a_hub_that_is_away_is_asked_again_and_then_told(tmp_path: Path) -> None:
    failure = refused("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": f"http://127.0.0.1:{hold_port()}"})
    assert failure.reason == "ModelSourceUnreachable"
    assert "cannot be reached for acme/tiny at main" in failure.message


def test_a_hub_that_fails_for_a_while_is_waited_for(hub: Server, tmp_path: Path) -> None:
    hub.behaviour.status = 503

    class Recovering(Progress):
        def begin(self, what: str, total: int = 0, done: int = 0) -> None:
            super().begin(what, total, done)
            if "asking again" in what:
                hub.behaviour.status = 0

    source = remote(Location("hf://acme/tiny", "main", False), {"HF_ENDPOINT": hub.url})
    folder = fetch(source, tmp_path, "tester", Recovering(), Patience(source_s=30, back_off_s=(0.01,)))
    assert contents(folder) == MODEL


def test_without_the_hub_the_copy_of_the_cache_is_served(hub: Server, tmp_path: Path) -> None:
    first = fetched("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url})
    hub.behaviour.status = 503
    assert fetched("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url}) == first
    hub.behaviour.asked.clear()
    assert fetched("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}) == first
    assert not hub.behaviour.asked
    failure = refused("hf://acme/other", tmp_path, {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"})
    assert failure.reason == "ModelSourceUnreachable"
    assert "HF_HUB_OFFLINE is set" in failure.message


def test_weights_that_arrive_damaged_are_fetched_again_and_then_refused(hub: Server, tmp_path: Path) -> None:
    hub.behaviour.damaged = True
    failure = refused("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url})
    assert failure.line.startswith("ModelInvalid: the model arrived damaged: config.json without the checksum")
    assert "model.safetensors without the checksum" in failure.message
    assert hub.behaviour.sent[f"/acme/tiny/resolve/{modelservers.COMMIT}/config.json"] == 2 * len(MODEL["config.json"])
    hub.behaviour.damaged = False
    assert contents(fetched("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url})) == MODEL


def test_a_copy_that_lost_a_byte_on_the_volume_is_fetched_again(hub: Server, tmp_path: Path) -> None:
    folder = fetched("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url})
    (folder / "model.safetensors").write_bytes(MODEL["model.safetensors"][:-1])
    assert contents(fetched("hf://acme/tiny", tmp_path, {"HF_ENDPOINT": hub.url})) == MODEL


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "eu-central-1",
    }
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="eu-central-1",
    )
    client.create_bucket(Bucket="models", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    for name, content in (MODEL | BESIDE).items():
        client.put_object(Bucket="models", Key=f"tiny/v1/{name}", Body=content)
    client.put_object(Bucket="models", Key="tiny/v10/config.json", Body=b"another model")
    client.put_object(Bucket="models", Key="notes/README.md", Body=b"no model")
    yield environment
    server.stop()


def test_a_bucket_gives_the_files_of_the_folder_that_is_named(
    s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    folder = fetched("s3://models/tiny/v1", tmp_path, s3, "")
    assert contents(folder) == MODEL
    assert fetched("s3://models/tiny/v1/", tmp_path, s3, "").name != ""


@contextmanager
def when_fetching(act: Callable[[], object], at: int) -> Iterator[Progress]:
    """Something happens once, when so many bytes have come."""

    class Acting(Progress):
        acted = False

        def advance(self, count: int) -> None:
            super().advance(count)
            if not self.acted and self.moved >= at:
                self.acted = True
                act()

    progress = Acting()
    yield progress
    assert progress.acted


def bucket(s3: dict[str, str], folder: str, files: dict[str, bytes]) -> Any:
    client = boto3.client("s3", endpoint_url=s3["AWS_ENDPOINT_URL"])
    for name, content in files.items():
        client.put_object(Bucket="models", Key=f"{folder}/{name}", Body=content)
    return client


LARGE = tiny_model(20 * 2**20)
BEFORE, AFTER = LARGE | {"added_tokens.json": b"1"}, LARGE | {"added_tokens.json": b"2"}


@pytest.mark.parametrize("at", [1, 2**20, 20 * 2**20])
def test_a_folder_that_changes_while_it_is_fetched_gives_one_version_and_no_mixture(
    at: int, s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    client = bucket(s3, f"synced-{at}", BEFORE)
    newer = AFTER | {"model.safetensors": LARGE["model.safetensors"][:-1] + b"!"}

    def sync() -> None:
        for name, content in newer.items():
            client.put_object(Bucket="models", Key=f"synced-{at}/{name}", Body=content)

    with when_fetching(sync, at) as progress:
        source = remote(Location(f"s3://models/synced-{at}", "", False), s3)
        assert contents(fetch(source, tmp_path, "tester", progress, IMPATIENT)) == newer


def test_a_folder_that_changes_all_the_time_is_refused_with_advice(
    s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    client = bucket(s3, "restless", MODEL)

    class Restless(Progress):
        def advance(self, count: int) -> None:
            super().advance(count)
            client.put_object(Bucket="models", Key="restless/config.json", Body=str(self.moved).encode())

    with pytest.raises(StartupFailed) as failed:
        fetch(remote(Location("s3://models/restless", "", False), s3), tmp_path, "tester", Restless(), IMPATIENT)
    assert failed.value.line.startswith("ModelInvalid: s3://models/restless changed while it was fetched; wait until")
    assert not [path for path in (tmp_path / "models").glob("restless*") if ".part-" not in path.name]


@pytest.mark.parametrize("model", [MODEL, LARGE])
def test_a_bucket_that_breaks_off_is_asked_again_and_then_told(
    model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with modelservers.bucket("models", {f"tiny/{name}": content for name, content in model.items()}) as server:
        server.behaviour.cut_at = 2**17
        source = remote(Location("s3://models/tiny", "", False), {"AWS_ENDPOINT_URL": server.url})
        with pytest.raises(StartupFailed) as failed:
            fetch(source, tmp_path, "tester", Progress(), IMPATIENT)
    assert failed.value.reason == "ModelSourceUnreachable"
    assert server.behaviour.asked["GET /models/tiny/model.safetensors"] > 1


def test_a_bucket_or_folder_that_is_not_there_is_told(
    s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    assert refused("s3://nowhere/tiny", tmp_path, s3).reason == "ModelNotFound"
    assert refused("s3://models/tiny/v2", tmp_path, s3).reason == "ModelNotFound"
    assert refused("s3://models/notes", tmp_path, s3).reason == "ModelNotFound"


def test_a_bucket_that_says_no_is_told_apart_from_one_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    away = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{hold_port()}"}
    assert refused("s3://models/tiny", tmp_path, away).reason == "ModelSourceUnreachable"
    with modelservers.hub({}) as server:
        server.behaviour.status = 403
        failure = refused("s3://models/tiny", tmp_path, {"AWS_ENDPOINT_URL": server.url})
        assert failure.reason == "ModelAccessDenied"
        assert "AWS_ACCESS_KEY_ID" in failure.message
        server.behaviour.status = 503
        assert (
            refused("s3://models/tiny", tmp_path, {"AWS_ENDPOINT_URL": server.url}).reason == "ModelSourceUnreachable"
        )


def raw_layers(files: dict[str, bytes], annotation: str = "org.opencontainers.image.title") -> list[Layer]:
    return [Layer(content, "application/octet-stream", {annotation: name}) for name, content in files.items()]


def packed(files: Mapping[str, bytes | str], *, media: str = "application/vnd.oci.image.layer.v1.tar+gzip") -> Layer:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):  # a link to there
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
                continue
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    body = stream.getvalue()
    return Layer(gzip.compress(body, mtime=0) if media.endswith("gzip") else body, media)


@pytest.mark.parametrize("annotation", ["org.opencontainers.image.title", "org.cncf.model.filepath"])
def test_an_artifact_gives_its_files(annotation: str, tmp_path: Path) -> None:
    layers = raw_layers(MODEL | BESIDE, annotation)
    with modelservers.registry("acme/tiny", {"v1": manifest(layers)}, layers) as server:
        folder = fetched(f"oci://{server.host}/acme/tiny:v1", tmp_path, {})
        assert contents(folder) == MODEL
        unwanted = modelservers.digest(BESIDE["train.py"])
        assert not server.behaviour.asked[f"GET /v2/acme/tiny/blobs/{unwanted}"]


@pytest.mark.parametrize(
    "media",
    [
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.cncf.model.weight.v1.tar",
    ],
)
def test_an_image_gives_the_model_that_lies_in_its_layers(media: str, tmp_path: Path) -> None:
    base = packed(
        {"etc/passwd": b"root", "models/model.safetensors": b"an older one", "models/old.txt": b""}, media=media
    )
    above = packed({f"models/{name}": content for name, content in MODEL.items()}, media=media)
    layers = [base, above]
    with modelservers.registry("acme/car", {"v1": manifest(layers)}, layers) as server:
        assert contents(fetched(f"oci://{server.host}/acme/car:v1", tmp_path, {})) == MODEL


def test_a_layer_takes_back_files_and_folders_of_earlier_layers_and_none_of_its_own(tmp_path: Path) -> None:
    under = {f"old/{name}": content for name, content in MODEL.items()}
    stale = {"models/extra.json": b"{}", "models/gone.json": b"{}", "other/deep/config.json": b"{}"}
    above = {f"models/{name}": content for name, content in MODEL.items()}
    opaque = above | {"models/.wh..wh..opq": b"", ".wh.old": b"", "other/.wh.deep": b"", ".wh...": b"", ".wh..": b""}
    layers = [packed(under | stale), packed(opaque)]
    with modelservers.registry("acme/car", {"v1": manifest(layers)}, layers) as server:
        assert contents(fetched(f"oci://{server.host}/acme/car:v1", tmp_path, {})) == MODEL


def test_a_whiteout_or_a_link_reaches_nothing_outside_of_the_copy(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_bytes(b"mine")
    escaping = {f"{'../' * 20}{outside.relative_to('/')}/.wh.config.json": b"", f"{outside}/.wh..wh..opq": b""}
    evil = [packed({**MODEL, **escaping}), packed({"models": str(outside), "models/.wh.config.json": b""})]
    with modelservers.registry("acme/evil", {"v1": manifest(evil)}, evil) as server:
        assert contents(fetched(f"oci://{server.host}/acme/evil:v1", tmp_path / "cache", {})) == MODEL
    assert (outside / "config.json").read_bytes() == b"mine"
    through = [packed({**MODEL, "models": str(outside), "models/config.json": b"evil"})]
    with modelservers.registry("acme/evil", {"v1": manifest(through)}, through) as server:
        fetched(f"oci://{server.host}/acme/evil:v1", tmp_path / "other", {})
    assert (outside / "config.json").read_bytes() == b"mine"
    linked = [packed({**MODEL, "tokenizer_config.json": str(outside / "config.json")})]
    with modelservers.registry("acme/evil", {"v1": manifest(linked)}, linked) as server:
        failure = refused(f"oci://{server.host}/acme/evil:v1", tmp_path / "third", {})
    assert "tokenizer_config.json in" in failure.message and "is a link, which is not followed" in failure.message


def test_an_index_of_platforms_gives_this_machines_image(tmp_path: Path) -> None:
    layers = raw_layers(MODEL)
    one = manifest(layers)
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {"digest": modelservers.digest(b"other"), "platform": {"architecture": "s390x"}},
            {"digest": modelservers.digest(one), "platform": {"architecture": "amd64"}},
            {"digest": modelservers.digest(one), "platform": {"architecture": "arm64"}},
        ],
    }
    tags = {"v1": json.dumps(index).encode(), "amd": one}
    with modelservers.registry("acme/tiny", tags, layers) as server:
        assert contents(fetched(f"oci://{server.host}/acme/tiny:v1", tmp_path, {})) == MODEL


def test_a_digest_that_is_in_the_cache_needs_no_registry(tmp_path: Path) -> None:
    layers = raw_layers(MODEL)
    body = manifest(layers)
    with modelservers.registry("acme/tiny", {"v1": body}, layers) as server:
        uri = f"oci://{server.host}/acme/tiny@{modelservers.digest(body)}"
        first = fetched(uri, tmp_path, {})
        server.behaviour.asked.clear()
        assert fetched(uri, tmp_path, {}) == first
        assert not server.behaviour.asked


@pytest.mark.parametrize("wants_token", [True, False])
@pytest.mark.parametrize("file_name", ["config.json", ".dockerconfigjson"])
def test_a_registry_that_wants_credentials_gets_those_of_the_docker_config(
    wants_token: bool, file_name: str, tmp_path: Path
) -> None:
    layers = raw_layers(MODEL)
    with modelservers.registry("acme/tiny", {"v1": manifest(layers)}, layers, basic=("bob", "secret")) as server:
        server.behaviour.token = "t0ken" if wants_token else ""
        uri = f"oci://{server.host}/acme/tiny:v1"
        without = refused(uri, tmp_path / "cache", {"HOME": str(tmp_path)})
        assert without.reason == "ModelAccessDenied"
        assert "DOCKER_CONFIG" in without.message
        entry = {"username": "bob", "password": "secret", "auth": "Ym9iOnNlY3JldA=="}
        (tmp_path / file_name).write_text(json.dumps({"auths": {server.host: entry}}))
        folder = fetched(uri, tmp_path / "cache", {"DOCKER_CONFIG": str(tmp_path)})
        assert contents(folder) == MODEL
        (tmp_path / file_name).write_text(json.dumps({"auths": {server.host: {"auth": "Ym9iOndyb25n"}}}))
        wrong = refused(uri, tmp_path / "other", {"DOCKER_CONFIG": str(tmp_path)})
        assert wrong.reason == "ModelAccessDenied"
        assert "wrong" not in wrong.message


@pytest.mark.parametrize("host", ["docker.io", "index.docker.io", "registry-1.docker.io"])
def test_docker_hubs_entry_is_found_under_the_key_that_docker_login_writes(host: str, tmp_path: Path) -> None:
    entry = {"auth": base64.b64encode(b"bob:se:cret").decode()}
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"https://index.docker.io/v1/": entry}}))
    assert credentials({"DOCKER_CONFIG": str(tmp_path)}, host) == ("bob", "se:cret")
    assert credentials({"DOCKER_CONFIG": str(tmp_path)}, "127.0.0.1:5000") is None


@pytest.mark.parametrize(
    "entry",
    [{"auth": "Ym9iOnNlY3JldA"}, {"auth": "%%%"}, {"auth": "/////w=="}, {"auth": "c2VjcmV0"}, {"auth": 7}, "secret"],
)
def test_an_entry_of_the_docker_config_that_is_damaged_is_told_without_its_secret(entry: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"127.0.0.1:5000": entry}}))
    with pytest.raises(StartupFailed) as failed:
        credentials({"DOCKER_CONFIG": str(tmp_path)}, "127.0.0.1:5000")
    assert failed.value.line.startswith("ModelAccessDenied: the entry 127.0.0.1:5000 of the docker config")
    assert "secret" not in failed.value.message
    assert str(entry) not in failed.value.message


def test_a_registrys_refusals_are_told_apart(tmp_path: Path) -> None:
    layers = raw_layers(MODEL)
    with modelservers.registry("acme/tiny", {"v1": manifest(layers)}, layers) as server:
        assert refused(f"oci://{server.host}/acme/tiny:v2", tmp_path, {}).reason == "ModelNotFound"
        assert refused(f"oci://{server.host}/acme/other:v1", tmp_path, {}).reason == "ModelNotFound"
        server.behaviour.damaged = True
        assert refused(f"oci://{server.host}/acme/tiny:v1", tmp_path, {}).reason == "ModelInvalid"
        server.behaviour.status = 503
        assert refused(f"oci://{server.host}/acme/tiny:v1", tmp_path, {}).reason == "ModelSourceUnreachable"
    assert refused(f"oci://127.0.0.1:{hold_port()}/a/b:v1", tmp_path, {}).reason == "ModelSourceUnreachable"


def test_an_archive_cannot_write_outside_of_its_folder(tmp_path: Path) -> None:
    layers = [packed({"../../model.safetensors": b"evil", **MODEL})]
    with modelservers.registry("acme/evil", {"v1": manifest(layers)}, layers) as server:
        failure = refused(f"oci://{server.host}/acme/evil:v1", tmp_path, {})
        assert failure.reason == "ModelInvalid"
        assert "outside of itself" in failure.message
    assert not list(tmp_path.glob("model.safetensors")) and not list((tmp_path / "models").glob("model.safetensors"))


def test_two_models_in_one_image_are_refused(tmp_path: Path) -> None:
    layers = [packed({f"{folder}/{name}": one for folder in ("a", "b") for name, one in MODEL.items()})]
    with modelservers.registry("acme/two", {"v1": manifest(layers)}, layers) as server:
        assert "holds several models (a and b)" in refused(f"oci://{server.host}/acme/two:v1", tmp_path, {}).message


def test_a_disk_without_room_is_told_with_the_numbers(hub: Server, tmp_path: Path) -> None:
    from gpumeter_worker.sources.cache import refuse_if_full

    with pytest.raises(StartupFailed) as failure:
        refuse_if_full(tmp_path, 10**18)
    assert failure.value.reason == "ModelCacheFull"
    assert "1,000,000,000,000 MB are still to be fetched" in failure.value.message
    assert "spec.cache.pvc" in failure.value.message


def test_a_cache_that_cannot_be_written_is_told(hub: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failure = refused("hf://acme/tiny", tmp_path / "file" / "cache", {"HF_ENDPOINT": hub.url})
    assert failure.reason == "ModelCacheUnusable"


def test_what_needs_no_fetching_is_a_path_and_what_is_no_source_is_refused_by_name() -> None:
    assert local_path("file:///mnt/models/a%20b") == Path("/mnt/models/a b")
    for uri in ("hf://owner/name", "s3://bucket/model", "oci://registry/model:v1"):
        assert local_path(uri) is None
    for uri in ("pvc://claim/model", "/plain/path", "file://elsewhere/model", "gs://bucket/model"):
        with pytest.raises(StartupFailed) as failed:
            local_path(uri)
        assert failed.value.reason == "ModelSourceUnsupported"
