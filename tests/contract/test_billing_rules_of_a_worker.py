"""Rules of the bill that only a whole worker can show: a real process, its HTTP, and the journal that is collected."""

import threading
import urllib.request
from pathlib import Path

import openai
import pytest

from gpumeter_usage.record import Kind, Status
from rigs.tinymodel import tiny_model
from rigs.worker import Ledger, hop_token, session_id, until, worker


def stepped_ns(ledger: Ledger) -> int:
    """What the pod booked as the time of steps, whoever was to pay it."""
    of_steps = {"attributed", "nonbillable"}
    return sum(r.gpu_ns for r in ledger.all() if r.kind is Kind.ACCOUNT and r.account in of_steps)


def test_health_probes_run_no_step_and_cost_nothing(tmp_path: Path) -> None:
    """Beside it: a cold start is in no session's bill, and a client's timeout ends its session with what it used."""
    model = tiny_model(tmp_path / "model")
    with worker(tmp_path, {"GPUMETER_MODEL_URI": f"file://{model}"}) as process:
        process.ready()
        ledger = Ledger()

        def probe() -> None:
            for path in ("healthz", "readyz", "metrics") * 30:
                with urllib.request.urlopen(f"{process.url}/{path}", timeout=10) as answer:
                    assert answer.status == 200

        threads = [threading.Thread(target=probe) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert process.metrics()["gpumeter_step_sequences_count"] == 0
        before = len(ledger.all())
        until(lambda: process.collect(ledger) or len(ledger.all()) > before, "the probes' time is journaled")
        assert {record.kind for record in ledger.all()} == {Kind.ACCOUNT}
        assert stepped_ns(ledger) == 0
        assert {record.account for record in ledger.all()} >= {"init", "load", "warmup"}

        session = session_id()
        client = openai.OpenAI(base_url=f"{process.url}/v1", api_key=hop_token(session=session), max_retries=0)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).chat.completions.create(
                model="smollm2",
                messages=[{"role": "user", "content": "Go on for ever."}],
                max_tokens=900,
                extra_body={"ignore_eos": True},
            )
        until(lambda: process.collect(ledger) or ledger.ended(session), "the session that timed out has ended")
        ledger.check()
        assert ledger.ended(session) is Status.CANCELLED
        used_ns = sum(record.gpu_ns for record in ledger.of_session(session))
        assert used_ns == stepped_ns(ledger) > 0
        assert min(record.started_at for record in ledger.of_session(session)) > max(
            record.ended_at for record in ledger.all() if record.account in {"init", "load", "warmup"}
        )
