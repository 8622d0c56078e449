"""The informer: what it holds, what it tells, and that it never ends by itself."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from gpumeter_operator.adapters.kubernetes import PODS, Keep, Labels, Manifest, Refused, Resource, Unreachable, whole
from gpumeter_operator.adapters.mirror import BACKOFF_S, Mirror

Step = tuple[str, Manifest] | Exception


def pod(name: str, uid: str = "1", **metadata: Any) -> Manifest:
    return {"metadata": {"namespace": "team-a", "name": name, "uid": uid, **metadata}}


class ScriptedSource:
    """A cluster that answers from a script: one list after the other, one series of changes after the other."""

    def __init__(self, lists: list[list[Manifest] | Exception], changes: list[list[Step]]) -> None:
        self.lists = lists
        self.changes = changes
        self.versions: list[str] = []
        self.exhausted = asyncio.Event()

    async def list_at(
        self,
        resource: Resource,
        namespace: str | None = None,
        labels: Labels | None = None,
        keep: Keep = whole,
    ) -> tuple[list[Manifest], str]:
        if not self.lists:
            self.exhausted.set()
            await asyncio.Event().wait()
        answer = self.lists.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [keep(one) for one in answer], f"v{len(self.lists)}"

    async def watch(
        self, resource: Resource, namespace: str | None, labels: Labels | None, version: str
    ) -> AsyncIterator[tuple[str, Manifest]]:
        self.versions.append(version)
        for step in self.changes.pop(0):
            if isinstance(step, Exception):
                raise step
            yield step


async def played(mirror: Mirror, source: ScriptedSource) -> None:
    task = asyncio.create_task(mirror.run())
    async with asyncio.timeout(20):
        await source.exhausted.wait()
    assert not task.done(), "a mirror never ends by itself"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_mirror_holds_what_the_list_and_the_changes_say() -> None:
    source = ScriptedSource(
        [[pod("a"), pod("b")]],
        [[("ADDED", pod("c")), ("MODIFIED", pod("a", labels={"new": "yes"})), ("DELETED", pod("b"))]],
    )
    mirror = Mirror(source, PODS)
    await played(mirror, source)
    assert set(mirror.objects) == {("team-a", "a"), ("team-a", "c")}
    assert mirror.objects["team-a", "a"]["metadata"]["labels"] == {"new": "yes"}
    assert source.versions == ["v0"]


async def test_synced_waits_for_the_first_complete_list_even_when_it_is_empty() -> None:
    source = ScriptedSource([Unreachable("away"), []], [[]])
    mirror = Mirror(source, PODS)
    task = asyncio.create_task(mirror.run())
    waiter = asyncio.create_task(mirror.synced())
    await asyncio.sleep(0)
    assert not waiter.done()
    async with asyncio.timeout(20):
        await waiter
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_was_removed_while_nobody_watched_is_told_with_its_last_known_state() -> None:
    removed: list[Manifest] = []
    source = ScriptedSource([[pod("a", labels={"last": "state"}), pod("b")], [pod("b")]], [[Unreachable("cut")], []])
    mirror = Mirror(source, PODS, on_remove=removed.append)
    await played(mirror, source)
    assert removed == [pod("a", labels={"last": "state"})]


async def test_a_namesake_with_another_uid_after_a_gap_counts_as_a_removal() -> None:
    removed: list[Manifest] = []
    source = ScriptedSource([[pod("a", uid="old")], [pod("a", uid="new")]], [[Refused(410, "Expired", "too old")], []])
    mirror = Mirror(source, PODS, on_remove=removed.append)
    await played(mirror, source)
    assert [item["metadata"]["uid"] for item in removed] == ["old"]
    assert mirror.objects["team-a", "a"]["metadata"]["uid"] == "new"


async def test_a_removal_by_the_watch_tells_the_state_that_the_server_sent_last() -> None:
    removed: list[Manifest] = []
    source = ScriptedSource([[pod("a")]], [[("DELETED", pod("a", labels={"end": "state"}))]])
    mirror = Mirror(source, PODS, on_remove=removed.append)
    await played(mirror, source)
    assert removed == [pod("a", labels={"end": "state"})]


async def test_bookmarks_are_heard_but_change_nothing() -> None:
    changes = []
    source = ScriptedSource([[pod("a")]], [[("BOOKMARK", {"metadata": {"resourceVersion": "9"}})]])
    mirror = Mirror(source, PODS, on_change=lambda: changes.append(dict(mirror.objects)))
    begun_ns = mirror.last_heard_ns
    await played(mirror, source)
    assert mirror.last_heard_ns > begun_ns
    assert len(changes) == 1, "only the first list is a change"


async def test_a_list_that_found_nothing_new_is_not_a_change() -> None:
    changes: list[int] = []
    source = ScriptedSource([[pod("a")], [pod("a")]], [[Unreachable("cut")], []])
    mirror = Mirror(source, PODS, on_change=lambda: changes.append(1))
    await played(mirror, source)
    assert changes == [1]


async def test_a_failing_listener_does_not_stop_the_mirror() -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the listener is broken")

    hook: Callable[..., None] = broken
    source = ScriptedSource([[pod("a")]], [[("ADDED", pod("b")), ("DELETED", pod("b")), ("ADDED", pod("c"))]])
    mirror = Mirror(source, PODS, on_change=hook, on_remove=hook)
    await played(mirror, source)
    assert set(mirror.objects) == {("team-a", "a"), ("team-a", "c")}


async def test_managed_fields_are_not_kept_because_they_are_half_of_an_object() -> None:
    source = ScriptedSource([[pod("a", managedFields=[{"manager": "x"}])]], [[]])
    mirror = Mirror(source, PODS)
    await played(mirror, source)
    assert "managedFields" not in mirror.objects["team-a", "a"]["metadata"]


async def test_a_refused_watch_backs_off_instead_of_listing_in_a_storm() -> None:
    refusals = 3
    source = ScriptedSource(
        [[] for _ in range(refusals)], [[Refused(403, "Forbidden", "may not watch")] for _ in range(refusals)]
    )
    mirror = Mirror(source, PODS)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await played(mirror, source)
    assert loop.time() - begun >= sum(BACKOFF_S[1 : refusals + 1]) * 0.99


async def test_a_watched_resource_is_not_silent() -> None:
    source = ScriptedSource([[pod("a")]], [[]])
    mirror = Mirror(source, PODS)
    task = asyncio.create_task(mirror.run())
    await source.exhausted.wait()
    assert mirror.silence(20) is None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_mirror_that_nothing_feeds_says_what_it_has_not_heard_about() -> None:
    mirror = Mirror(ScriptedSource([], []), PODS)
    task = asyncio.create_task(mirror.run())
    await asyncio.sleep(0.01)
    sentence = mirror.silence(0.001)
    assert sentence is not None
    assert sentence.startswith("Nothing was heard about pods for ")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_unreachable_api_server_that_is_tried_again_is_no_silence() -> None:
    source = ScriptedSource([Unreachable("away")], [])
    mirror = Mirror(source, PODS)
    await asyncio.sleep(0.6)
    assert mirror.silence(0.5) is not None
    task = asyncio.create_task(mirror.run())
    await asyncio.sleep(0)
    assert not source.lists, "it was tried"
    assert mirror.silence(0.5) is None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_mirror_that_ended_says_what_ended_it() -> None:
    mirror = Mirror(ScriptedSource([RuntimeError("a surprise")], []), PODS)
    await asyncio.gather(mirror.run(), return_exceptions=True)
    assert mirror.silence(20) == "Watching pods has ended: RuntimeError('a surprise')."


async def test_what_a_write_returned_is_there_before_the_watch_tells_of_it() -> None:
    source = ScriptedSource([[pod("a", resourceVersion="7")]], [[]])
    mirror = Mirror(source, PODS)
    await played(mirror, source)
    mirror.learn(pod("a", resourceVersion="8", labels={"new": "yes"}))
    assert mirror.objects["team-a", "a"]["metadata"]["labels"] == {"new": "yes"}


async def test_a_write_that_was_overtaken_by_its_deletion_does_not_bring_the_object_back() -> None:
    source = ScriptedSource(
        [[]], [[("ADDED", pod("a", resourceVersion="7")), ("DELETED", pod("a", resourceVersion="8"))]]
    )
    mirror = Mirror(source, PODS)
    await played(mirror, source)
    mirror.learn(pod("a", resourceVersion="7"))
    assert mirror.objects == {}


async def test_a_write_that_was_overtaken_by_another_does_not_put_the_older_state_back() -> None:
    source = ScriptedSource([[]], [[("ADDED", pod("a", resourceVersion="7", labels={"state": "newer"}))]])
    mirror = Mirror(source, PODS)
    await played(mirror, source)
    mirror.learn(pod("a", resourceVersion="6", labels={"state": "older"}))
    assert mirror.objects["team-a", "a"]["metadata"]["labels"] == {"state": "newer"}
