"""Claims, progress, and which files belong to a model."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gpumeter_worker.failure import StartupFailed
from gpumeter_worker.sources import cache
from gpumeter_worker.sources.claim import Claim, Watch
from gpumeter_worker.sources.fetch import Patience, fetch
from gpumeter_worker.sources.progress import Progress
from gpumeter_worker.sources.remote import Damaged, RemoteFile, Snapshot, Unreachable
from gpumeter_worker.sources.wanted import wanted
from rigs.worker import until

FILES = (RemoteFile("config.json", 2), RemoteFile("model.safetensors", 4))


def place(folder: Path, version: str) -> cache.Place:
    return cache.place(folder, "hf://a/b", version, allow_pickle=False)


def fill(where: cache.Place, owner: str) -> Path:
    return made(cache.take_over(where, owner))


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(b"1234")
    return folder


def test_a_claim_is_taken_once_and_again_after_its_release(tmp_path: Path) -> None:
    first, second = (Claim(tmp_path / "claim", owner, 0.05) for owner in ("a", "b"))
    assert first.take()
    assert not second.take()
    first.release()
    assert second.take()
    first.release()
    assert (tmp_path / "claim").exists(), "only its owner releases a claim"
    second.release()
    assert not (tmp_path / "claim").exists()


def test_a_claim_that_beats_is_never_stale_and_says_how_far_its_owner_is(tmp_path: Path) -> None:
    claim = Claim(tmp_path / "claim", "a", 0.02)
    assert claim.take()
    claim.told = "half"
    watch = Watch(tmp_path / "claim", 0.5)
    beats = set()

    def beaten() -> bool:
        assert not watch.is_stale()
        beats.add((tmp_path / "claim").read_text())
        return len(beats) > 30 and watch.told == "half"

    until(beaten, "thirty beats")
    claim.release()


def test_a_claim_that_is_taken_again_beats_again(tmp_path: Path) -> None:
    claim = Claim(tmp_path / "claim", "a", 0.02)
    assert claim.take()
    claim.release()
    assert not claim.held()
    assert claim.take()
    before = (tmp_path / "claim").read_text()
    until(lambda: (tmp_path / "claim").read_text() not in ("", before), "it beats", 10)
    assert claim.held()
    claim.release()


def test_a_claim_that_is_being_rewritten_is_held_at_every_moment_and_gone_with_its_release(tmp_path: Path) -> None:
    claim = Claim(tmp_path / "claim", "a", 0.0)
    for _ in range(20):
        assert claim.take()
        beat = (tmp_path / "claim").read_text()
        assert all(claim.held() for _ in range(100))
        until(lambda beat=beat: (tmp_path / "claim").read_text() != beat, "it beats")
        claim.release()
        assert not list(tmp_path.iterdir())


def test_a_claim_without_an_owner_grows_stale_and_can_be_broken(tmp_path: Path) -> None:
    (tmp_path / "claim").write_text('{"owner": "dead", "beats": 3, "told": ""}')
    watch = Watch(tmp_path / "claim", 0.1)
    until(watch.is_stale, "it stands still")
    watch.break_it("b")
    assert Claim(tmp_path / "claim", "b", 0.05).take()


def test_the_slower_of_two_breakers_leaves_the_new_owners_claim(tmp_path: Path) -> None:
    (tmp_path / "claim").write_text('{"owner": "dead", "beats": 3, "told": ""}')
    slower = Watch(tmp_path / "claim", 0.1)
    until(slower.is_stale, "it stands still")
    (tmp_path / "claim").unlink()
    claim = Claim(tmp_path / "claim", "new", 10)
    assert claim.take()
    slower.break_it("slow")
    assert not Claim(tmp_path / "claim", "slow", 10).take()
    claim.release()
    assert not list(tmp_path.iterdir())


def test_a_copy_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    cache.prepare(tmp_path)
    where = place(tmp_path, "v1")
    part = fill(where, "me")
    assert not cache.whole(where)
    cache.publish(where, "me", "hf://a/b", Snapshot("v1", 6, FILES))
    assert cache.whole(where)
    assert not part.exists()
    assert where != place(tmp_path, "v2")


def test_a_copy_that_someone_else_made_first_stays(tmp_path: Path) -> None:
    cache.prepare(tmp_path)
    where = place(tmp_path, "v1")
    fill(where, "me")
    cache.publish(where, "me", "hf://a/b", Snapshot("v1", 6, FILES))
    before = (where.folder / "model.safetensors").stat().st_ino
    fill(where, "other")
    cache.publish(where, "other", "hf://a/b", Snapshot("v1", 6, FILES))
    assert (where.folder / "model.safetensors").stat().st_ino == before
    assert not where.part("other").exists()


@pytest.mark.parametrize("name", ["model.safetensors", ".gpumeter.json"])
def test_a_copy_that_lost_something_is_not_whole_and_is_replaced(name: str, tmp_path: Path) -> None:
    cache.prepare(tmp_path)
    where = place(tmp_path, "v1")
    fill(where, "me")
    cache.publish(where, "me", "hf://a/b", Snapshot("v1", 6, FILES))
    (where.folder / name).write_bytes(b"1")
    assert not cache.whole(where)
    fill(where, "me")
    cache.publish(where, "me", "hf://a/b", Snapshot("v1", 6, FILES))
    assert cache.whole(where)


def test_what_a_dead_owner_fetched_is_taken_over(tmp_path: Path) -> None:
    cache.prepare(tmp_path)
    where = place(tmp_path, "v1")
    made(where.part("dead"))
    where.part("deader").mkdir()
    mine = cache.take_over(where, "me")
    assert cache.held_bytes(mine) == 6
    assert not where.part("dead").exists()
    assert not where.part("deader").exists()


def test_what_differs_from_the_source_is_removed_and_told_together(tmp_path: Path) -> None:
    made(tmp_path / "part")
    wrong = (RemoteFile("config.json", 2, "sha256:00"), RemoteFile("model.safetensors", 5), RemoteFile("absent", 1))
    with pytest.raises(Damaged) as damaged:
        cache.check(tmp_path / "part", wrong)
    for part in ("config.json without the checksum", "model.safetensors with 4 of 5 bytes", "absent with 0 of 1 bytes"):
        assert part in damaged.value.message
    assert not list((tmp_path / "part").iterdir())


def test_what_nobody_wrote_to_for_an_hour_is_swept(tmp_path: Path) -> None:
    cache.prepare(tmp_path)
    old, new = (cache.place(tmp_path, f"hf://a/{name}", "v1", allow_pickle=False) for name in ("old", "new"))
    for where in (old, new):
        made(where.part("dead"))
        where.claim.write_text("{}")
    beat = old.claim.with_name(f"{old.claim.name}.beat-dead")
    beat.write_text("{")
    for path in (beat, old.claim, old.part("dead"), *old.part("dead").iterdir()):
        os.utime(path, (0, 0))
    cache.sweep(tmp_path)
    assert not beat.exists()
    assert not old.part("dead").exists()
    assert not old.claim.exists()
    assert new.part("dead").exists()
    assert new.claim.exists()


def test_the_part_of_a_claim_that_beats_is_not_swept_however_long_it_is_checked(tmp_path: Path) -> None:
    cache.prepare(tmp_path)
    where = place(tmp_path, "v1")
    part = fill(where, "checks")
    for path in (part, *part.iterdir()):
        os.utime(path, (0, 0))
    where.claim.write_text("{}")
    cache.sweep(tmp_path)
    assert (part / "model.safetensors").exists()
    os.utime(where.claim, (0, 0))
    cache.sweep(tmp_path)
    assert not part.exists()


def test_what_a_killed_download_left_is_neither_counted_nor_published(tmp_path: Path) -> None:
    cache.prepare(tmp_path)
    where = place(tmp_path, "v1")
    part = fill(where, "me")
    (part / "model.safetensors.Ab12cD34").write_bytes(b"123")
    (part / "half").mkdir()
    (part / "half" / "one").write_bytes(b"123")
    (part / ".cache").mkdir()
    (part / ".cache" / "goes-on").write_bytes(b"12")
    cache.tidy(part, FILES, ".cache")
    assert cache.held_bytes(part) == 6 + 2
    (part / "config.json.incomplete").write_bytes(b"123")
    cache.publish(where, "me", "hf://a/b", Snapshot("v1", 6, FILES))
    assert sorted(path.name for path in where.folder.iterdir()) == [
        ".gpumeter.json",
        "config.json",
        "model.safetensors",
    ]


def test_an_owner_who_was_taken_over_while_asleep_publishes_nothing(tmp_path: Path) -> None:
    cache.prepare(tmp_path)
    where = place(tmp_path, "v1")
    fill(where, "sleeper")
    cache.take_over(where, "other")
    with pytest.raises(cache.Displaced):
        cache.publish(where, "sleeper", "hf://a/b", Snapshot("v1", 6, ()))
    half = where.part("sleeper")
    half.mkdir()  # as a source does that goes on with the next layer
    (half / "config.json").write_bytes(b"{}")
    with pytest.raises(cache.Displaced):
        cache.publish(where, "sleeper", "hf://a/b", Snapshot("v1", 6, ()))
    assert not where.folder.exists()
    cache.publish(where, "other", "hf://a/b", Snapshot("v1", 6, FILES))
    assert cache.whole(where)


class Source:
    """A source whose copy does what the test says."""

    uri, revision, pinned, resumed, allow_pickle = "hf://a/b", "main", "", "", False

    def __init__(self, files: tuple[RemoteFile, ...], copy: Callable[[Path, Progress], None]) -> None:
        self.files, self.copied, self._copy = files, 0, copy

    def look(self) -> Snapshot:
        return Snapshot("v1", 6, self.files)

    def copy(self, snapshot: Snapshot, folder: Path, progress: Progress) -> None:
        self.copied += 1
        self._copy(folder, progress)

    def elsewhere(self) -> None:
        return None


QUICK = Patience(source_s=60, back_off_s=(0.001,), beat_s=10, stale_s=60, poll_s=0.01)


def test_an_owner_who_wakes_up_after_a_takeover_serves_what_the_other_one_made(tmp_path: Path) -> None:
    where = place(tmp_path, "v1")

    def sleeps_through_a_takeover(folder: Path, _: Progress) -> None:
        (folder / "config.json").write_bytes(b"{}")
        where.claim.unlink()
        claim = Claim(where.claim, "other", 10)
        assert claim.take()
        fill(where, "other")
        cache.publish(where, "other", "hf://a/b", Snapshot("v1", 6, FILES))
        claim.release()
        folder.mkdir()
        (folder / "half").write_bytes(b"of it")

    source = Source((), sleeps_through_a_takeover)
    assert fetch(source, tmp_path, "sleeper", Progress(), QUICK) == where.folder
    assert source.copied == 1
    assert sorted(path.name for path in where.folder.iterdir()) == [
        ".gpumeter.json",
        "config.json",
        "model.safetensors",
    ]
    assert not where.part("sleeper").exists()


def test_a_source_that_always_breaks_at_the_same_place_is_given_up(tmp_path: Path) -> None:
    def breaks(_: Path, progress: Progress) -> None:
        progress.advance(3_000_000)
        raise Unreachable("it hung up")

    source = Source(FILES, breaks)
    with pytest.raises(Unreachable) as failed:
        fetch(source, tmp_path, "me", Progress(), QUICK)
    assert source.copied == 6
    assert failed.value.reason == "ModelSourceUnreachable"
    assert failed.value.message.startswith("it hung up; it broke off 6 times and never came further than 3 MB")


def test_a_source_that_breaks_again_and_again_but_further_each_time_is_waited_for(tmp_path: Path) -> None:
    def breaks(folder: Path, progress: Progress) -> None:
        progress.advance(1000 * source.copied)
        if source.copied < 20:
            raise Unreachable("it hung up")
        made(folder)

    source = Source(FILES, breaks)
    assert fetch(source, tmp_path, "me", Progress(), QUICK) == place(tmp_path, "v1").folder


def test_a_copy_with_pickles_and_one_without_are_two(tmp_path: Path) -> None:
    source = Source(FILES, lambda folder, _: made(folder) and None)
    strict = fetch(source, tmp_path, "me", Progress(), QUICK)
    source.allow_pickle = True
    assert fetch(source, tmp_path, "me", Progress(), QUICK) != strict
    assert source.copied == 2


def test_progress_tells_amount_rate_and_what_is_left() -> None:
    now_s = [0.0]
    progress = Progress(lambda: now_s[0])
    assert progress.text() == "starting"
    progress.begin("fetching the model", 4_000_000_000, 400_000_000)
    assert progress.text() == "fetching the model: 400 of 4,000 MB (10 %)"
    for _ in range(10):
        now_s[0] += 1
        progress.advance(85_000_000)
    assert progress.text() == "fetching the model: 1,250 of 4,000 MB (31 %), 85 MB/s, 32 s left"
    now_s[0] += 1000
    assert progress.text().endswith("left")
    progress.begin("checking")
    assert progress.text() == "checking"


def test_a_model_is_its_weights_configuration_tokenizer_and_templates() -> None:
    held = [
        "README.md",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "config.json",
        "consolidated.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "modeling_own.py",
        "onnx/model.onnx",
        "original/params.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert wanted(held, allow_pickle=False) == [
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert wanted(["a.safetensors", "pytorch_model.bin"], allow_pickle=True) == ["a.safetensors"]
    assert wanted(["pytorch_model.bin"], allow_pickle=True) == ["pytorch_model.bin"]
    assert wanted(["pytorch_model.bin"], allow_pickle=False) == []


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "ModelCacheFull"), (errno.EDQUOT, "ModelCacheFull"), (errno.EROFS, "ModelCacheUnusable")],
)
def test_a_disk_that_fills_up_in_the_middle_is_told_apart_from_one_that_cannot_be_written(
    number: int, reason: str, tmp_path: Path
) -> None:
    class OnAFullDisk:
        uri, revision, pinned, resumed, allow_pickle = "hf://a/b", "main", "", "", False

        def look(self) -> Snapshot:
            return Snapshot("v1", 6, FILES)

        def copy(self, snapshot: Snapshot, folder: Path, progress: Progress) -> None:
            (folder / "config.json").write_bytes(b"{}")
            raise OSError(number, os.strerror(number))

        def elsewhere(self) -> None:
            return None

    with pytest.raises(StartupFailed) as failed:
        fetch(OnAFullDisk(), tmp_path, "me", Progress())
    assert failed.value.reason == reason
    assert str(tmp_path) in failed.value.message
    assert not list((tmp_path / "models").glob("*.claim")), "another may try at once"
