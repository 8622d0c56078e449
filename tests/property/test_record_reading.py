"""The short way in which the ledger reads records takes what the contract takes, and changes nothing."""

import json
from dataclasses import fields

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from gpumeter_operator.billing.reading import Row, read
from gpumeter_usage.record import Account, Kind, Record, RecordInvalid, Status, canonical, parse
from rigs.thoroughness import examples

GOOD = json.loads(
    canonical(
        Record(
            worker_uid="w", boot_id="b", seq=1, kind=Kind.SESSION, account=Account.ATTRIBUTED, session_id="s",
            tenant="t",
            service="n/s", model="m", started_at=1, ended_at=2, gpu_ns=3, prefill_ns=1, decode_ns=2, gpu_class="h100",
            clock="cuda", status=Status.OPEN,
        )
    )
)  # fmt: skip
OF_ENERGY = GOOD | {
    "kind": "account", "account": "idle", "gpu_ns": 0, "prefill_ns": 0, "decode_ns": 0, "session_id": "", "tenant": "",
    "status": "", "energy_mj": 7,
}  # fmt: skip
ODD = st.one_of(
    st.sampled_from([*Kind, *Status, *Account]).map(str),
    st.sampled_from(["", "x" * 257, "\x7f", "\n", "é", "\ud800", "_platform", None, True, 1.0, -1, 0, 1, 3, 2**63, []]),
    st.text(max_size=5),
    st.integers(),
)


def told(reader: object, body: bytes) -> object:
    try:
        record = reader(body)  # type: ignore[operator]
    except RecordInvalid as refusal:
        return str(refusal)
    stated = {field.name: getattr(record, field.name) for field in fields(Record)}
    return stated | {"energy_mj": None if record.energy_mj is UNSET else record.energy_mj}


@settings(max_examples=examples(400), deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from([*sorted(GOOD), "energy_mj"]), ODD, max_size=4),
    good=st.sampled_from([GOOD, OF_ENERGY]),
    cut=st.sampled_from([None, "steps", "kind"]),
    added=st.booleans(),
    spaces=st.booleans(),
    tail=st.sampled_from([b"", b" ", b"x", b"{}", b"\n"]),
)
def test_both_ways_take_the_same_records_and_refuse_the_others_in_the_same_words(
    *, changes: dict[str, object], good: dict[str, object], cut: str | None, added: bool, spaces: bool, tail: bytes
) -> None:
    values = good | changes | ({"more": 1} if added and changes else {})
    values = {name: value for name, value in values.items() if name != cut or not changes}
    body = json.dumps(values, separators=None if spaces else (",", ":"), ensure_ascii=False)
    encoded = body.encode("utf-8", "surrogatepass") + tail
    assert told(read, encoded) == told(parse, encoded)


def test_an_ordinary_record_takes_the_short_way() -> None:
    assert isinstance(read(json.dumps(GOOD).encode()), Row)
    assert isinstance(read(json.dumps(OF_ENERGY).encode()), Row)
