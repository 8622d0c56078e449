"""NVML as it is really asked: NVIDIA's bindings in a process of their own, over a library with NVML's C interface."""

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest

from gpumeter_operator.billing.facts import PLATFORM
from gpumeter_operator.billing.facts import Worker as Pod
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.verify import Finding
from gpumeter_usage.chain import GENESIS, Link, link
from gpumeter_usage.page import Page
from gpumeter_usage.period import SECOND_NS, Granularity
from gpumeter_usage.record import Record, Status, canonical
from gpumeter_worker.checks import MachineFacts, Verdict, check_machine
from gpumeter_worker.machine import Driver, Others, read_probe
from gpumeter_worker.metering.accounts import Phase
from gpumeter_worker.metering.parts import Part
from gpumeter_worker.metrics import exposition
from gpumeter_worker.settings import from_environment
from gpumeter_worker.telemetry.sample import Sample
from gpumeter_worker.telemetry.sampler import PROGRAM, Sampler
from gpumeter_worker.worker import Worker
from rigs.audited import HOUR_NS, audited, digested
from rigs.ledger import ended, finals, gone, open_ledger, started
from rigs.nvml import A100, A100_INSTANCE, GPU_UUID, MIG_UUID, StandIn, build


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def gpu(libraries: Path, tmp_path: Path) -> StandIn:
    return StandIn(libraries, tmp_path / "script")


@asynccontextmanager
async def sampling(
    environment: dict[str, str], *, silent_s: float = 20, interval_s: float = 0.02
) -> AsyncIterator[tuple[Sampler, list[Sample]]]:
    heard: list[Sample] = []
    assigned = [f"{name}={value}" for name, value in environment.items()]
    sampler = Sampler(
        heard.append,
        interval_s=interval_s,
        silent_s=silent_s,
        back_off_s=(0.05,),
        program=("/usr/bin/env", *assigned, *PROGRAM),
    )
    running = asyncio.create_task(sampler.run())
    try:
        yield sampler, heard
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until(what: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.005)


def reason(sampler: Sampler) -> str:
    return sampler.absence.reason if sampler.absence else ""


async def test_every_figure_of_a_whole_gpu_is_read(gpu: StandIn) -> None:
    async with sampling(gpu.environment) as (sampler, heard):
        await until(lambda: len(heard) >= 3)
        assert sampler.absence is None
    assert sampler.latest == Sample(
        at_ns=heard[-1].at_ns,
        uuid=GPU_UUID,
        name="NVIDIA A100-SXM4-40GB",
        mig_profile="",
        driver="570.133.20",
        gpu_percent=87,
        memory_percent=41,
        memory_used_bytes=600 * 2**20,
        memory_total_bytes=40 * 2**30,
        power_mw=312_500,
        energy_mj=9_000_000_000,
        temperature_c=61,
        sm_mhz=1410,
        memory_mhz=1215,
        nvlink_sent_bytes=2 * 2**20,
        nvlink_received_bytes=2**20,
        processes=0,
        mps_clients=0,
        exclusive=False,
    )
    assert all(one.at_ns < other.at_ns for one, other in pairwise(heard))


async def test_figures_follow_the_device(gpu: StandIn) -> None:
    async with sampling(gpu.environment) as (sampler, heard):
        await until(lambda: bool(heard))
        gpu.say(A100 | {"gpu": 3, "energy_mj": 9_000_000_777, "processes": 2, "compute_mode": 3})
        await until(lambda: sampler.latest is not None and sampler.latest.gpu_percent == 3)
        assert sampler.latest is not None
        assert (sampler.latest.energy_mj, sampler.latest.processes) == (9_000_000_777, 2)
        assert sampler.latest.exclusive is True


FIGURES = {
    "nvmlDeviceGetUtilizationRates": ("gpu_percent", "memory_percent"),
    "nvmlDeviceGetMemoryInfo": ("memory_used_bytes", "memory_total_bytes"),
    "nvmlDeviceGetPowerUsage": ("power_mw",),
    "nvmlDeviceGetTotalEnergyConsumption": ("energy_mj",),
    "nvmlDeviceGetTemperature": ("temperature_c",),
    "nvmlDeviceGetClockInfo": ("sm_mhz", "memory_mhz"),
    "nvmlDeviceGetFieldValues": ("nvlink_sent_bytes", "nvlink_received_bytes"),
    "nvmlDeviceGetComputeRunningProcesses_v3": ("processes",),
    "nvmlDeviceGetMPSComputeRunningProcesses_v3": ("mps_clients",),
    "nvmlDeviceGetComputeMode": ("exclusive",),
    "nvmlSystemGetDriverVersion": ("driver",),
    "nvmlDeviceGetMigMode": (),
    "nvmlDeviceIsMigDeviceHandle": (),
}


async def test_what_a_device_does_not_tell_is_absent_and_everything_else_is_there(gpu: StandIn) -> None:
    """Each call alone: not supported (3), no permission (4), not in this library (13), and unknown (999)."""
    optional = {name for names in FIGURES.values() for name in names}
    async with sampling(gpu.environment) as (sampler, heard):
        await until(lambda: bool(heard))
        for number, (function, names) in enumerate(FIGURES.items()):
            code = (3, 4, 13, 999)[number % 4]
            gpu.say(A100 | {f"fail.{function}": code, "temperature_c": 100 + number})
            told = (
                (lambda number=number: sampler.latest is not None and sampler.latest.temperature_c == 100 + number)
                if "temperature_c" not in names
                else (lambda: sampler.latest is not None and sampler.latest.temperature_c is None)
            )
            if names != ("driver",):  # read once, when the device is opened
                await until(told)
                assert sampler.latest is not None
                absent = {name for name in optional if getattr(sampler.latest, name) is None}
                assert absent == set(names), function
        assert sampler.absence is None
    gpu.say(dict.fromkeys(A100, None) | {name: A100[name] for name in ("uuid", "name")})
    async with sampling(gpu.environment) as (sampler, heard):
        await until(lambda: bool(heard))
        assert all(getattr(heard[0], name) is None for name in optional)


async def test_a_mig_instance_is_named_and_tells_nothing_that_is_its_neighbours(gpu: StandIn) -> None:
    gpu.say(A100_INSTANCE)
    async with sampling(gpu.environment) as (_, heard):
        await until(lambda: bool(heard))
    (seen, *_) = heard
    assert (seen.uuid, seen.name, seen.mig_profile) == (MIG_UUID, "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "1g.5gb")
    assert (seen.memory_total_bytes, seen.temperature_c) == (5 * 10**9, 61)
    assert (seen.power_mw, seen.energy_mj, seen.gpu_percent, seen.nvlink_sent_bytes) == (None, None, None, None)


@pytest.mark.parametrize("figures", [A100, A100_INSTANCE], ids=["whole", "mig"])
async def test_of_several_gpus_it_is_the_one_that_cuda_takes_first(gpu: StandIn, figures: dict[str, object]) -> None:
    gpu.say(figures | {"count": 2, "fail.nvmlDeviceGetHandleByIndex_v2": 999})  # NVML's first is another
    async with sampling(gpu.environment) as (_, heard):
        await until(lambda: bool(heard))
    assert heard[0].uuid == (GPU_UUID if figures is A100 else MIG_UUID)


async def test_a_gpu_in_mig_mode_without_an_instance_for_us_is_no_gpu(gpu: StandIn) -> None:
    gpu.say(A100_INSTANCE | {"mig.index": 99})
    async with sampling(gpu.environment) as (sampler, heard):
        await until(lambda: reason(sampler) == "NvmlGpuNotFound")
        assert heard == []


async def test_a_gpu_that_is_lost_is_said_to_be_and_found_again(gpu: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    async with sampling(gpu.environment) as (sampler, heard):
        await until(lambda: bool(heard))
        gpu.say(A100 | {"lost": 1})
        await until(lambda: reason(sampler) == "NvmlGpuLost")
        assert sampler.latest is None
        gpu.say(A100)
        await until(lambda: sampler.latest is not None)
        assert sampler.absence is None
    lost = [record.message for record in caplog.records if "NvmlGpuLost" in record.message]
    assert lost == ["NvmlGpuLost: the GPU does not answer any more (GPU is lost); drain the node and reset it"]


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"fail.nvmlInitWithFlags": 9}, "NvmlDriverNotLoaded"),
        ({"fail.nvmlInitWithFlags": 18}, "NvmlDriverNotLoaded"),  # another version than the library
        ({"fail.nvmlInitWithFlags": 999}, "NvmlFailed"),
        ({"count": 0}, "NvmlGpuNotFound"),
        ({"crash.nvmlDeviceGetPowerUsage": 1}, "NvmlFailed"),
    ],
)
async def test_a_driver_that_fails_is_a_stated_fact(gpu: StandIn, figures: dict[str, object], expected: str) -> None:
    gpu.say(A100 | figures)
    async with sampling(gpu.environment) as (sampler, heard):
        await until(lambda: reason(sampler) == expected)
        assert heard == []


async def test_without_the_library_there_is_one_sentence_and_no_second_try(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = Sampler(lambda _: None, program=("/usr/bin/env", f"LD_LIBRARY_PATH={tmp_path}", *PROGRAM))
    if has_driver():
        pytest.skip("this machine has NVIDIA's driver")
    await asyncio.wait_for(sampler.run(), 30)
    assert reason(sampler) == "NvmlLibraryNotFound"
    told = [record.message for record in caplog.records if record.name == "gpumeter_worker.telemetry.sampler"]
    assert told == [
        "NvmlLibraryNotFound: the driver's library libnvidia-ml.so.1 is not in this container, so the GPU's "
        "utilisation, power and energy are not told; have the container toolkit give it the capability `utility`"
    ]


async def test_a_driver_that_hangs_holds_nobody_up(gpu: StandIn) -> None:
    gpu.say(A100 | {"hang.nvmlDeviceGetTemperature": 600_000})
    async with sampling(gpu.environment, silent_s=1.0) as (sampler, heard):
        late_ms = 0.0
        while reason(sampler) != "NvmlSilent":
            before = time.monotonic()
            await asyncio.sleep(0.01)
            late_ms = max(late_ms, (time.monotonic() - before) * 1000 - 10)
        assert heard == []
        assert late_ms < 10_000  # the event loop went on, whatever else this machine does: the driver hangs for 600 s
        gpu.say(A100)
        await until(lambda: bool(heard))


def test_the_process_that_asks_ends_with_whoever_wanted_to_know(gpu: StandIn) -> None:
    process = subprocess.Popen(
        [*PROGRAM, "10"], env=os.environ | gpu.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b'{"sample"')
    process.stdin.close()
    assert process.wait(10) == 0
    process.stdout.close()


async def test_a_worker_on_a_mig_instance_names_it_in_its_records_and_metrics(
    gpu: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.say(A100_INSTANCE)
    for name, value in gpu.environment.items():
        monkeypatch.setenv(name, value)
    asked = {"GPUMETER_GPU_COUNT": "1", "XDG_STATE_HOME": str(tmp_path)}
    settings = from_environment(asked, dev=True, model="file:///models/none")
    worker = Worker(settings, time.monotonic_ns())
    looking = asyncio.create_task(worker.gpu.run())
    try:
        await until(lambda: worker.gpu.sample is not None)
        flush = worker.meter.cut(time.time_ns())
        assert flush is not None
        assert {(one.gpu_uuid, one.gpu_class) for one in flush.records} == {
            (MIG_UUID, "NVIDIA A100-SXM4-40GB MIG 1g.5gb")
        }
        text = exposition(worker).decode()
        assert f'gpumeter_gpu_memory_bytes{{gpu="{MIG_UUID}"}} 5e+09' in text
        assert 'mig_profile="1g.5gb"' in text
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


async def test_the_energy_that_nvml_counts_is_in_the_reports_of_the_ledger(
    gpu: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in gpu.environment.items():
        monkeypatch.setenv(name, value)
    asked = {"GPUMETER_GPU_COUNT": "1", "XDG_STATE_HOME": str(tmp_path)}
    worker = Worker(from_environment(asked, dev=True, model="file:///models/none"), time.monotonic_ns())
    meter, looking = worker.meter, asyncio.create_task(worker.gpu.run())
    try:
        await until(lambda: worker.gpu.sample is not None)
        meter.enter(Phase.SERVING, time.time_ns())
        for tenant in ("acme", "beta"):
            began_ns = time.time_ns()
            meter.begin(tenant, tenant, began_ns)
            meter.step(began_ns, began_ns + 3_000_000, 3_000_000, [Part(tenant, 8, 0, prefill=True, sampled=1)])
            await asyncio.sleep(0.005)
            ended_ns = time.time_ns()
            meter.end(tenant, Status.FINISHED, ended_ns)
        gpu.say(A100 | {"energy_mj": A100["energy_mj"] + 4_000_001})
        await until(lambda: worker.gpu.energy.windows == 1)
        # As if no time had passed: what is stated in a period that nobody used is the platform's.
        flush = meter.cut(ended_ns + 1)
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
    assert flush is not None
    spent = worker.gpu.energy
    assert spent.attributed_mj + spent.platform_mj == 4_000_001
    assert spent.attributed_mj > 0
    joules, findings = await asyncio.to_thread(billed, flush.records, tmp_path / "ledger.db")
    assert joules.keys() == {PLATFORM, "acme", "beta"}
    assert sum(joules.values()) == Decimal("4000.001")
    assert joules["acme"] + joules["beta"] == Decimal(spent.attributed_mj) / 1000
    assert findings == []


def billed(records: Sequence[Record], file: Path) -> tuple[dict[str, Decimal], list[Finding]]:
    """The joules of each tenant's reports that a ledger makes of a worker's records, and what an audit of it finds."""
    first, links = records[0], list[Link]()
    for seq, record in enumerate(records, start=1):
        links.append(link(links[-1].hash if links else GENESIS, canonical(record, seq)))
    namespace, _, service = first.service.partition("/")
    pod = Pod(first.worker_uid, namespace, service, "svc-uid", first.model, first.gpu_class, 1, "pod")
    last_ns = records[-1].ended_at
    ledger = open_ledger(file, Granularity.HOUR)
    life = [started("c", first.started_at), ended("c", last_ns), gone(last_ns)]
    ledger.observe(pod, life, last_ns)
    ledger.take(pod, Page(pod.worker_uid, pod.service_key, first.boot_id, 0, last_ns, tuple(links)), last_ns)
    later_ns = last_ns + 2 * HOUR_NS
    Closer(ledger, SECOND_NS).close_all(Pricing({}, {}), later_ns)
    digested(ledger, later_ns)
    joules: dict[str, Decimal] = {}
    for (_, tenant), report in finals(ledger, (namespace, service)).items():
        joules[tenant] = joules.get(tenant, Decimal(0)) + Decimal(report["status"].get("energyJoules", 0))
    return joules, audited(ledger, later_ns)


def has_driver() -> bool:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def probe(gpu: StandIn) -> Driver:
    """What diagnosis reads at a worker's start."""
    command = [sys.executable, "-m", "gpumeter_worker.gpuprobe"]
    done = subprocess.run(command, env=os.environ | gpu.environment, capture_output=True, check=True, timeout=60)
    return read_probe(done.stdout.decode())


def facts(driver: Driver, mps_pipe: str = "") -> MachineFacts:
    return MachineFacts(1, ("nvidia0",), driver, "12.8", 2**30, 32 * 10**9, mps_pipe)


def test_a_quiet_gpu_and_a_mig_instance_pass_the_checks_of_the_start(gpu: StandIn) -> None:
    driver = probe(gpu)
    assert driver.others == Others(0, 0, 0)
    assert driver.gpus[0].free == 40 * 2**30 - 600 * 2**20
    assert {check.verdict for check in check_machine(facts(driver))} == {Verdict.OK}
    gpu.say(A100_INSTANCE)
    driver = probe(gpu)
    assert driver.gpus[0].name == "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    assert driver.gpus[0].free == driver.gpus[0].total == 5 * 10**9
    named = replace(facts(driver), gpu_class="a100.1g.5gb")
    assert {check.verdict for check in check_machine(named)} == {Verdict.OK}
    refused = [check.failed for check in check_machine(replace(named, gpu_class="a100")) if check.failed]
    assert [one.reason for one in refused] == ["GpuClassWrong"]


@pytest.mark.parametrize(
    ("figures", "found"),
    [
        ({"processes": 2}, "GpuShared: 2 other processes compute on this GPU"),
        ({"mps_clients": 1}, "GpuShared: this GPU is shared by MPS (1 MPS client)"),
        ({"used": 3 * 10**9}, "GpuShared: 3.0 GB of this GPU's memory are used, and not by this worker"),
    ],
)
def test_a_gpu_that_somebody_computes_on_is_refused(gpu: StandIn, figures: dict[str, object], found: str) -> None:
    gpu.say(A100 | figures)
    failed = [check.failed for check in check_machine(facts(probe(gpu))) if check.failed]
    assert len(failed) == 1
    assert failed[0].line.startswith(found)


def test_a_probe_without_nvml_knows_the_gpu_and_not_who_else_uses_it(gpu: StandIn) -> None:
    gpu.say(A100 | {"fail.nvmlInitWithFlags": 999})
    driver = probe(gpu)
    assert driver.others == Others()
    assert driver.gpus[0].free == driver.gpus[0].total
    assert json.dumps({"problem": driver.problem}) == '{"problem": ""}'
