"""The operator's process: it stands by, acts as long as it holds the Lease, and ends; and kopf's handlers.

Owns the order of that, what a signal does, and which event of an InferenceService leads to which call. Decides nothing.
"""

import asyncio
import logging
import signal
import socket
import uuid
from datetime import timedelta
from typing import Any

import kopf

from gpumeter_operator.adapters.kubernetes import Cluster
from gpumeter_operator.adapters.lease import Leases
from gpumeter_operator.candidate import Candidate
from gpumeter_operator.decide.credentials import internal_token
from gpumeter_operator.flow.doors import doors_of
from gpumeter_operator.flow.election import Election
from gpumeter_operator.flow.operation import Operation
from gpumeter_operator.flow.scale_ports import NoDoors, OpenDoors
from gpumeter_operator.flow.tenure import InTenure, Tenure
from gpumeter_operator.handled import HandledInMemory
from gpumeter_operator.login import login
from gpumeter_operator.settings import HANDLER_BACKOFF_S, Settings, configure_kopf

SERVICES = ("gpumeter.io", "v1alpha1", "inferenceservices")
WRITES_END_WITHIN_S = 1.0  # of a clean stop; who waits longer gives the next one no lease, which then expires by itself
KOPF_ENDS_WITHIN_S = 5.0
STOP_WITHIN_S = 20  # of the pod's grace period of 30 s

log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Run the operator until it is told to stop, or has lost the Lease: then the process ends here, with code 1."""
    _quiet_kopf()
    asyncio.run(_run(settings))


async def _run(settings: Settings) -> None:
    cluster, leases = Cluster.connect(), Leases(Cluster.connect(), settings.namespace, settings.lease)
    tenure = Tenure()
    candidate = Candidate(leases, tenure, f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}")
    operation = _operation(settings, InTenure(cluster, tenure), candidate.election)
    try:
        await _Process(settings, operation, tenure, candidate).live()
    finally:
        await operation.stop()
        await candidate.close()


class _Process:
    """From standing by to the end. All that it waits for are tasks older than kopf's, because kopf spares those."""

    def __init__(self, settings: Settings, operation: Operation, tenure: Tenure, candidate: Candidate) -> None:
        self._settings = settings
        self._operation = operation
        self._tenure = tenure
        self._candidate = candidate
        self._told = asyncio.Event()
        self._listen()
        self._stop = asyncio.create_task(self._told.wait(), name="signals")
        candidate.stand()

    async def live(self) -> None:
        """Return when a signal has come, or when kopf has ended; where the Lease is lost, the process ends inside."""
        await self._operation.serve()
        won = asyncio.create_task(self._candidate.won.wait(), name="won")
        await asyncio.wait({won, self._stop}, return_when=asyncio.FIRST_COMPLETED)
        won.cancel()
        if self._told.is_set():
            await self._give_back()
        else:
            await self._act()

    async def _act(self) -> None:
        settings, handled, stop = kopf.OperatorSettings(), HandledInMemory(), asyncio.Event()
        configure_kopf(settings, handled)
        others = asyncio.all_tasks()  # kopf cancels every task that was not there before it
        tasks = await kopf.spawn_tasks(
            registry=handlers(handled, self._tenure),
            settings=settings,
            memo=self._operation,
            standalone=True,
            clusterwide=True,
            stop_flag=stop,
        )
        self._listen()  # kopf has put its own answer to signals in their place
        running = asyncio.create_task(kopf.run_tasks(tasks, ignored=others), name="kopf")
        await asyncio.wait({running, self._stop}, return_when=asyncio.FIRST_COMPLETED)
        await self._give_back()
        stop.set()
        await asyncio.wait({running}, timeout=KOPF_ENDS_WITHIN_S)
        if running.done():
            running.result()  # where it ended by itself, its failure is ours
        else:
            running.cancel()  # a write of kopf that waits at the closed gate does so for ever

    async def _give_back(self) -> None:
        """Write nothing any more, and then let the next one begin: nobody has to wait until kopf has ended."""
        signal.alarm(STOP_WITHIN_S)  # ends the process where something hangs
        await self._candidate.stand_down()  # first: who holds the Lease in a tenure that is closed has lost it
        self._tenure.close()
        if not await self._tenure.idle(WRITES_END_WITHIN_S):
            log.warning(
                "A write takes longer than %.0f s, so the lease is not given back but expires.", WRITES_END_WITHIN_S
            )
        elif await self._candidate.release():
            log.info("LeaseReleased: the next operator may begin.")

    def _listen(self) -> None:
        for one in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(one, self._told.set)


def _operation(settings: Settings, cluster: InTenure, election: Election) -> Operation:
    doors: OpenDoors = NoDoors
    if settings.gateway_service:
        doors = doors_of(cluster, settings.gateway_service, internal_token(settings.master_key))
    return Operation(
        cluster,
        settings.installation,
        settings.master_key,
        interval_s=settings.status_interval_ms / 1_000,
        hold_s=settings.status_hold_ms / 1_000,
        deletion_margin=timedelta(milliseconds=settings.deletion_margin_ms),
        http=(settings.http_host, settings.http_port),
        open_doors=doors,
        election=election,
    )


def handlers(handled: HandledInMemory, tenure: Tenure | None = None) -> kopf.OperatorRegistry:
    """All handlers, in a registry of their own.

    `handled` is what kopf's settings name too. kopf's own writes happen in `tenure`; without one (a bench that has no
    Lease) they always may.
    """
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def log_in(**kwargs: Any) -> Any:
        return login(tenure, **kwargs)

    @kopf.on.startup(registry=registry)
    async def startup(memo: Operation, **_: Any) -> None:
        await memo.start()

    @kopf.on.cleanup(registry=registry)
    async def cleanup(memo: Operation, **_: Any) -> None:
        await memo.rest()

    # Before anything is written or decided: it tells that the watch lives, though an object's handlers may be kept
    # from being called, by a policy that refuses its finalizer for example.
    @kopf.on.event(*SERVICES, id="heard", registry=registry)
    async def heard(event: Any, body: Any, memo: Operation, **_: Any) -> None:
        memo.hear(body["metadata"], gone=event["type"] == "DELETED")
        if event["type"] == "DELETED":
            handled.forget(body["metadata"]["uid"])

    # One function for all three: with create and resume alone, edits would be swallowed. A failure is not raised: kopf
    # would note every retry in the object, and the next round looks again in seconds anyway.
    @kopf.on.resume(*SERVICES, id="reconcile", registry=registry)
    @kopf.on.create(*SERVICES, id="reconcile", registry=registry)
    @kopf.on.update(*SERVICES, id="reconcile", registry=registry)
    async def reconcile(body: Any, memo: Operation, **_: Any) -> None:
        await memo.look(dict(body))

    @kopf.on.delete(*SERVICES, id="release", backoff=HANDLER_BACKOFF_S, registry=registry)
    async def release(body: Any, memo: Operation, **_: Any) -> None:
        if (sentence := await memo.leave(dict(body))) is not None:
            raise kopf.TemporaryError(sentence, delay=HANDLER_BACKOFF_S)

    return registry


def _quiet_kopf() -> None:
    """Kopf tells of every handled event at INFO; with DEBUG a developer sees them."""
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        for chatty in ("kopf.objects", "kopf.activities", "kopf._core.engines.activities"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
