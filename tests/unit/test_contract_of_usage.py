import json
from dataclasses import asdict

import pytest

from gpumeter_usage.apportion import largest_remainder
from gpumeter_usage.canonical import canonical_json
from gpumeter_usage.chain import GENESIS, ChainBroken, Link, link, verify
from gpumeter_usage.page import (
    Boot,
    JournalStatus,
    Page,
    PageInvalid,
    decode_page,
    decode_status,
    encode_page,
    encode_status,
)
from gpumeter_usage.period import MINUTE_NS, Granularity, from_rfc3339, period_of, rfc3339
from gpumeter_usage.record import Kind, Record, RecordInvalid, Status, canonical, parse


def slice_of_a_session(**changes: object) -> Record:
    values: dict[str, object] = {
        "worker_uid": "pod-1",
        "boot_id": "boot-1",
        "seq": 1,
        "kind": Kind.SESSION,
        "account": "attributed",
        "session_id": "s-1",
        "tenant": "acme",
        "service": "team-a/smollm2",
        "model": "smollm2",
        "started_at": 10,
        "ended_at": 20,
        "gpu_ns": 10,
        "prefill_ns": 4,
        "decode_ns": 6,
        "gpu_class": "cpu",
        "clock": "host",
        "status": Status.OPEN,
    }
    return Record(**(values | changes))  # type: ignore[arg-type]


def test_a_record_survives_its_canonical_form():
    record = slice_of_a_session(tenant="ümlaut")
    assert parse(canonical(record)) == record


def test_the_canonical_form_is_sorted_compact_json_of_integers_and_strings():
    body = canonical(slice_of_a_session())
    stated = {name: value for name, value in asdict(slice_of_a_session()).items() if value is not None}
    assert body == canonical_json(stated), "the short way gives what the long one gives"
    assert body == json.dumps(json.loads(body), sort_keys=True, separators=(",", ":")).encode()
    assert {type(value) for value in json.loads(body).values()} == {int, str}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpu_ns": -1}, "gpu_ns is -1; it must be a whole number from 0"),
        ({"gpu_ns": 2**63}, "gpu_ns is 9223372036854775808; it must be a whole number"),
        ({"gpu_ns": True}, "gpu_ns is True"),
        ({"tenant": "x" * 257}, "it must be a string of at most 256 printable characters"),
        ({"tenant": "a\n"}, "printable characters"),
        ({"tenant": "\ud800"}, "printable characters"),
        ({"seq": 0}, "sequence numbers start at 1"),
        ({"ended_at": 9}, "ended_at 9 lies before started_at 10"),
        ({"prefill_ns": 5}, "prefill_ns + decode_ns must equal gpu_ns"),
        ({"account": "idle"}, "a session cannot own time of the account 'idle'"),
        ({"tenant": ""}, "names its session_id and its tenant"),
        ({"kind": "refund"}, "unknown kind or status"),
        ({"kind": "account"}, "an account record names no session"),
        ({"kind": "seal"}, "a seal has the status drained or recovered"),
    ],
)
def test_a_record_that_cannot_be_true_is_refused_with_a_sentence(changes: dict[str, object], sentence: str):
    body = json.dumps(json.loads(canonical(slice_of_a_session())) | changes).encode()
    with pytest.raises(RecordInvalid) as refused:
        parse(body)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"\xff", b"{" * 10_000, b"[" * 8000, b'{"a":1}'])
def test_bytes_that_are_no_record_are_refused(body: bytes):
    with pytest.raises(RecordInvalid):
        parse(body)


def chain_of(count: int) -> list[Link]:
    links, head = [], GENESIS
    for seq in range(1, count + 1):
        links.append(link(head, canonical(slice_of_a_session(seq=seq))))
        head = links[-1].hash
    return links


def test_a_chain_verifies_in_pages_of_any_length():
    links = chain_of(5)
    head = verify(GENESIS, links[:2])
    assert verify(head, links[2:]) == links[-1].hash


@pytest.mark.parametrize("damage", ["lost", "swapped", "changed"])
def test_a_damaged_chain_is_found(damage: str):
    links = chain_of(4)
    if damage == "lost":
        del links[1]
    elif damage == "swapped":
        links[1], links[2] = links[2], links[1]
    else:
        links[1] = Link(links[1].hash, links[1].body.replace(b"acme", b"evil"))
    with pytest.raises(ChainBroken, match="record 1 of the page"):
        verify(GENESIS, links)


def test_a_page_arrives_as_it_was_sent():
    page = Page("pod-1", "team-a/smollm2", "boot-1", 0, 99, tuple(chain_of(3)))
    assert decode_page(encode_page(page)) == page


def test_a_page_cut_anywhere_is_refused():
    data = encode_page(Page("pod-1", "team-a/smollm2", "boot-1", 0, 99, tuple(chain_of(3))))
    for end in range(len(data)):
        with pytest.raises(PageInvalid):
            decode_page(data[:end])


def test_a_status_arrives_as_it_was_sent():
    status = JournalStatus(
        "pod-1", "team-a/smollm2", 7, (Boot("b", 3, "h", 2, True, "g"), Boot("c", 0, GENESIS, 0, False))
    )
    assert decode_status(encode_status(status)) == status


def test_a_status_of_a_worker_that_does_not_tell_what_it_was_acknowledged_is_read_too():
    status = JournalStatus("pod-1", "team-a/smollm2", 7, (Boot("b", 3, "h", 2, True, "g"),))
    told = encode_status(status).replace(b',"acknowledged_hash":"g"', b"")
    assert decode_status(told).boots == (Boot("b", 3, "h", 2, True, ""),)
    with pytest.raises(PageInvalid, match="acknowledged_hash is 5"):
        decode_status(encode_status(status).replace(b':"g"', b":5"))


def test_what_ends_on_an_edge_belongs_to_the_period_that_it_ends():
    assert period_of(MINUTE_NS, Granularity.MINUTE).start_ns == 0
    assert period_of(MINUTE_NS + 1, Granularity.MINUTE).start_ns == MINUTE_NS
    first = period_of(1, Granularity.HOUR)
    assert period_of(first.end_ns + 1, Granularity.HOUR).start_ns == first.end_ns


def test_a_period_is_labelled_as_reports_name_it():
    start_ns = from_rfc3339("2026-11-21T14:05:00Z")
    assert period_of(start_ns + 1, Granularity.MINUTE).label == "20261121t1405"
    assert period_of(start_ns + 1, Granularity.HOUR).label == "20261121t14"
    assert rfc3339(start_ns) == "2026-11-21T14:05:00Z"


def test_the_shares_of_a_step_are_whole_and_ties_go_to_the_lower_index():
    assert largest_remainder(10, [1, 1, 1]) == [4, 3, 3]
    assert largest_remainder(7, [0, 0]) == [4, 3]
    with pytest.raises(ValueError, match="no weights"):
        largest_remainder(1, [])
