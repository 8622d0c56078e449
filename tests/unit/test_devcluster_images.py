"""What makes an image be built again, what pip is told inside a build, and where Debian's packages come from."""

import json
import os
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from devcluster import baseimages, imageload, ociarchive
from devcluster.errors import ClusterError
from devcluster.imagekeys import DEVELOPMENT, IMAGES, OPERATOR, WORKER, Image, key_of
from devcluster.images import Wish, base_version, merged_pip_settings, write_built
from devcluster.layout import REPOSITORY

EVERY = (*IMAGES, DEVELOPMENT)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with the inputs of all images."""
    for image in EVERY:
        for name in image.inputs():
            path = tmp_path / name
            if "." in Path(name).name:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"content of {name}\n")
            else:
                (path / "src").mkdir(parents=True, exist_ok=True)
                (path / "src" / "code.py").write_text("x = 1\n")
    return tmp_path


@pytest.mark.parametrize("image", EVERY, ids=lambda image: image.name)
def test_every_input_of_an_image_exists_in_the_repository(image: Image) -> None:
    assert [name for name in image.inputs() if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("image", EVERY, ids=lambda image: image.name)
def test_the_key_covers_everything_that_the_dockerfile_copies(image: Image) -> None:
    lines = (REPOSITORY / image.dockerfile).read_text().splitlines()
    copied = [line.split()[1] for line in lines if line.startswith("COPY") and "--from" not in line]
    assert copied
    assert set(copied) <= set(image.inputs())


@pytest.mark.parametrize("image", EVERY, ids=lambda image: image.name)
def test_the_official_base_is_the_dockerfiles_default(image: Image) -> None:
    assert f"ARG {image.base_argument}={image.official_base}\n" in (REPOSITORY / image.dockerfile).read_text()


def test_the_image_with_jupyterlab_is_built_only_when_it_is_asked_for_and_after_the_workers() -> None:
    assert Wish("c").images() == (OPERATOR, WORKER)
    assert Wish("c", only=("operator",)).images() == (OPERATOR,)
    assert Wish("c", development=True).images() == (OPERATOR, WORKER, DEVELOPMENT)
    assert Wish("c", only=("worker",), development=True).images() == (WORKER, DEVELOPMENT)
    assert Wish("c", only=("operator",), development=True).images() == (OPERATOR, WORKER, DEVELOPMENT)


def test_the_image_with_jupyterlab_is_built_again_when_the_workers_was(tmp_path: Path) -> None:
    versions = set()
    for workers in ("one", "two"):
        write_built(tmp_path, {WORKER.name: workers})
        versions.add(base_version(DEVELOPMENT, WORKER.reference, tmp_path))
    assert len(versions) == 2
    assert base_version(WORKER, "base", tmp_path) == "base"


def test_an_edit_of_a_source_changes_the_key(tree: Path) -> None:
    before = key_of(WORKER, tree, "base")
    (tree / "worker/src/code.py").write_text("x = 2\n")
    assert key_of(WORKER, tree, "base") != before


def test_an_edit_of_the_worker_leaves_the_operators_key_alone(tree: Path) -> None:
    before = key_of(OPERATOR, tree, "base")
    (tree / "worker/src/code.py").write_text("x = 2\n")
    assert key_of(OPERATOR, tree, "base") == before


def test_a_new_empty_file_changes_the_key(tree: Path) -> None:
    before = key_of(WORKER, tree, "base")
    (tree / "usage/src/py.typed").touch()
    assert key_of(WORKER, tree, "base") != before


def test_another_base_changes_the_key(tree: Path) -> None:
    assert key_of(WORKER, tree, "base") != key_of(WORKER, tree, "other")


def test_times_and_compiled_files_do_not_change_the_key(tree: Path) -> None:
    before = key_of(WORKER, tree, "base")
    os.utime(tree / "worker/src/code.py", (1, 1))
    (tree / "worker/src/__pycache__").mkdir()
    (tree / "worker/src/__pycache__/code.pyc").write_text("compiled")
    (tree / "worker/gpumeter_worker.egg-info").mkdir()
    (tree / "worker/gpumeter_worker.egg-info/PKG-INFO").write_text("made by an editable install")
    assert key_of(WORKER, tree, "base") == before


def test_pip_inside_a_build_gets_the_index_and_no_path_of_this_machine() -> None:
    file = "[global]\nindex-url = https://one.example/simple\ncert = /etc/bundle.pem\n[install]\ntimeout = 60\n"
    merged = merged_pip_settings([file], {"PIP_FIND_LINKS": "/opt/wheels", "PIP_TRUSTED_HOST": "two.example"})
    assert merged == ("[global]\nindex-url = https://one.example/simple\ntimeout = 60\ntrusted-host = two.example\n")


def test_the_environment_overrides_pips_files() -> None:
    file = "[global]\nindex-url = https://one.example/simple\n"
    assert "two.example" in merged_pip_settings([file], {"PIP_INDEX_URL": "https://two.example/simple"})


STANZAS = """Types: deb
URIs: https://tools.example/apt
Suites: nodistro
Components: main

Types: deb
# a comment inside
URIs: http://debian.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://debian.example/debian-security
Suites: bookworm-security
Components: main
"""


def test_the_stanza_of_the_release_itself_names_the_archive() -> None:
    assert baseimages.parse_deb822(STANZAS, "bookworm") == baseimages.Source(
        "http://debian.example/debian", "/usr/share/keyrings/debian-archive-keyring.gpg"
    )
    assert baseimages.parse_deb822(STANZAS, "trixie") is None


@pytest.mark.parametrize(
    ("line", "keyring"),
    [
        ("deb http://debian.example/debian bookworm main contrib", ""),
        ("deb [arch=amd64 signed-by=/k.gpg] http://debian.example/debian bookworm main", "/k.gpg"),
    ],
)
def test_one_line_sources_are_read_with_and_without_options(line: str, keyring: str) -> None:
    text = f"# deb http://old.example/debian bookworm main\ndeb http://other.example/ bookworm-tools main\n{line}\n"
    assert baseimages.parse_one_line(text, "bookworm") == baseimages.Source("http://debian.example/debian", keyring)


def test_a_base_with_other_packages_or_another_bundle_has_another_key() -> None:
    base = baseimages.Base("base", ("python3",))
    keys = {
        baseimages.recipe_key(base, b""),
        baseimages.recipe_key(base, b"bundle"),
        baseimages.recipe_key(baseimages.Base("base", ("python3", "gcc")), b""),
    }
    assert len(keys) == 3


def test_an_archive_of_a_program_is_the_same_every_time() -> None:
    first, second = (ociarchive.archive_of_program("localhost/pause:3", "pause", b"\x7fELF") for _ in range(2))
    assert first == second


def layout_of(tmp_path: Path) -> tuple[Path, dict[str, object]]:
    """Unpack an archive into a layout, named as image programs name it."""
    layout = tmp_path / "layout"
    archive = ociarchive.archive_of_program("localhost/a:dev", "program", b"content")
    with tarfile.open(fileobj=BytesIO(archive)) as opened:
        opened.extractall(layout, filter="data")
    index = json.loads((layout / "index.json").read_text())
    index["manifests"][0]["annotations"] = {imageload.NAME: "localhost/a:dev"}
    (layout / "index.json").write_text(json.dumps(index))
    return layout, index["manifests"][0]


def test_only_missing_layers_travel(tmp_path: Path) -> None:
    layout, manifest = layout_of(tmp_path)
    needed = imageload.digests(layout, manifest)
    assert len(needed) == 3
    target = BytesIO()
    imageload.write_archive(target, layout, "localhost/a:dev", manifest, needed[:2])
    with tarfile.open(fileobj=BytesIO(target.getvalue())) as opened:
        names = opened.getnames()
    assert names == ["oci-layout", "index.json", *(f"blobs/{digest.replace(':', '/')}" for digest in needed[:2])]


def test_a_sweep_keeps_what_the_image_needs_and_nothing_else(tmp_path: Path) -> None:
    layout, manifest = layout_of(tmp_path)
    (layout / "blobs/sha256/0000").write_text("left by an older build")
    imageload.sweep(layout, "localhost/a:dev")
    kept = {f"sha256:{file.name}" for file in (layout / "blobs/sha256").iterdir()}
    assert kept == set(imageload.digests(layout, manifest))


def test_an_image_that_was_not_built_is_asked_for_in_words(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="build it with `devcluster images`"):
        imageload.find_manifest(tmp_path, "localhost/a:dev")
