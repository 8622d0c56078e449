"""An operator that begins with so many workers that asking all of them takes longer than silence may last."""

import asyncio
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import Any

from gpumeter_operator.adapters.kubernetes import Manifest
from gpumeter_operator.adapters.scraping import Unanswered
from gpumeter_operator.adapters.signals import PARALLEL, TIMEOUT_S, Signals
from gpumeter_operator.decide.spec import Problem
from gpumeter_operator.flow.scale import EVERY_S, UNKNOWN_AFTER_MS, Scaler
from gpumeter_operator.flow.scale_held import HOLDS_MS
from rigs.scaling import BEGUN
from rigs.virtualtime import now_s, run_virtually

TEXT = b"vllm:num_requests_waiting 0\nvllm:num_requests_running 1\ngpumeter_sessions_total 4\n"
SETTLED = {
    "queueLength": 0,
    "conditions": [{"type": "ScalingReady", "status": "True", "reason": "WithinTarget", "message": "All is well."}],
}


class Many:
    """Settled services with a worker each, at an address each, that answers after `answers_s` or, if dead, never."""

    def __init__(self, number: int, answers_s: float, dead: Collection[int] = ()) -> None:
        self.objects = {("team-a", f"s{one}"): _service(one) for one in range(number)}
        self.told: dict[str, tuple[str, float]] = {}
        self.asked_s: dict[str, float] = {}  # by address, when for the first time
        self._answers_s = answers_s
        self._dead = {f"10.0.{one // 250}.{one % 250}" for one in dead}
        self._pods = {("team-a", f"s{one}"): [_pod(one)] for one in range(number)}
        self.signals = Signals(clock_ms=_now_ms, pages=self)
        self.scaler = Scaler(
            self,
            self,  # type: ignore[arg-type]
            self.signals,
            self,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            reconcile=self.reconcile,
            tell=self.tell,
            clock=lambda: BEGUN + timedelta(seconds=now_s()),
            clock_ms=_now_ms,
        )

    async def run(self, seconds: float) -> None:
        until_s = now_s() + seconds
        while now_s() < until_s:
            next_s = now_s() + EVERY_S
            await self.scaler.tick()
            await asyncio.sleep(max(0.0, next_s - now_s()))

    def unknown(self) -> list[str]:
        """Services of whose queue the status would say that nobody knows it."""
        figures = {service["metadata"]["name"]: self.scaler.figures(service) for service in self.objects.values()}
        return [name for name, one in figures.items() if one is None or one.queue_length is None]

    async def get(self, address: str) -> bytes:
        self.asked_s.setdefault(address, now_s())
        if address in self._dead:
            await asyncio.sleep(3_600)
            raise Unanswered("it is dead")
        await asyncio.sleep(self._answers_s)
        return TEXT

    def keep(self, addresses: Collection[str]) -> None:
        pass

    def close(self) -> None:
        pass

    def pods_of(self, namespace: str, name: str) -> list[Manifest]:
        return self._pods[namespace, name]

    def deployment(self, namespace: str, name: str) -> Manifest:
        return {"spec": {"replicas": 1}, "status": {}}

    def asked(self) -> Mapping[str, Any]:
        return {}

    def silent(self) -> tuple[str, ...]:
        return ()

    async def patch(self, *_: object, **__: object) -> None:
        raise AssertionError("nobody is to be marked")

    async def reconcile(self, service: Manifest) -> None:
        pass

    async def tell(self, service: Manifest, told: Problem, normal: bool, now: datetime) -> None:
        self.told[service["metadata"]["name"]] = told.reason, now_s()


def _now_ms() -> int:
    return int(now_s() * 1_000)


def _service(number: int) -> Manifest:
    metadata = {"namespace": "team-a", "name": f"s{number}", "uid": f"s-{number}", "generation": 1}
    spec = {"model": {"uri": "hf://o/n"}, "scaling": {"minReplicas": 1, "maxReplicas": 8}}
    return {"metadata": metadata, "spec": spec, "status": SETTLED}


def _pod(number: int) -> Manifest:
    ready = [{"type": "Ready", "status": "True"}]
    return {
        "metadata": {
            "namespace": "team-a",
            "name": f"p{number}",
            "uid": f"u{number}",
            "resourceVersion": "1",
            "labels": {"gpumeter.io/draining": "false"},
            "annotations": {"gpumeter.io/service-uid": f"s-{number}"},
            "creationTimestamp": "2026-11-21T10:00:00Z",
        },
        "spec": {"nodeName": "n"},
        "status": {"phase": "Running", "podIP": f"10.0.{number // 250}.{number % 250}", "conditions": ready},
    }


def test_workers_that_wait_for_their_turn_are_not_told_as_silent_and_those_that_do_not_answer_are() -> None:
    number, dead = 1_600, (0, 834, 1_599)

    async def begin() -> None:
        world = Many(number, answers_s=1.4, dead=dead)
        await world.run(90)
        asked_s = sorted(world.asked_s.values())
        assert len(asked_s) == number and asked_s[-1] > UNKNOWN_AFTER_MS / 1_000, "it took longer than silence may"
        names = {f"s{one}" for one in dead}
        assert {name: reason for name, (reason, _) in world.told.items()} == dict.fromkeys(names, "SignalsMissing")
        assert set(world.unknown()) == names
        for one in dead:
            first_s = world.asked_s[f"10.0.{one // 250}.{one % 250}"]
            assert world.told[f"s{one}"][1] - first_s >= HOLDS_MS / 1_000

    run_virtually(begin())


def test_where_all_are_asked_at_once_a_silent_worker_is_told_within_seconds_of_the_start() -> None:
    async def begin() -> None:
        world = Many(PARALLEL, answers_s=0.1, dead=(7,))
        await world.run(60)
        assert list(world.told) == ["s7"] == world.unknown()
        assert world.told["s7"][1] <= HOLDS_MS / 1_000 + TIMEOUT_S + EVERY_S

    run_virtually(begin())
