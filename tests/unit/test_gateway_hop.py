import jwt
import pytest
from multidict import CIMultiDict

from gpumeter_operator.gateway import hop, refusal
from gpumeter_operator.gateway.refusal import Refusal
from gpumeter_operator.gateway.sse import MAX_EVENT_BYTES, EventCutter, EventTooLong
from gpumeter_usage.hop import new_session

KEY = "k" * 64


def test_the_token_states_tenant_session_and_service_for_sixty_seconds() -> None:
    claims = jwt.decode(
        hop.token(hop.Hop("acme", "s-1", "uid-1"), KEY, now_s=1000),
        KEY,
        algorithms=["HS256"],
        audience="uid-1",
        issuer="gpumeter-gateway",
        options={"verify_exp": False, "verify_iat": False},
    )
    assert claims == {
        "iss": "gpumeter-gateway",
        "aud": "uid-1",
        "tenant": "acme",
        "session": "s-1",
        "iat": 1000,
        "exp": 1060,
    }


def test_the_token_of_one_service_is_worthless_at_another() -> None:
    token = hop.token(hop.Hop("acme", "s-1", "uid-1"), KEY, now_s=2**33)
    with pytest.raises(jwt.InvalidAudienceError):
        jwt.decode(token, KEY, algorithms=["HS256"], audience="uid-2", options={"verify_iat": False})
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(token, "o" * 64, algorithms=["HS256"], audience="uid-1", options={"verify_iat": False})


def test_session_ids_are_the_servers_own_and_never_repeat() -> None:
    ids = {new_session() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(one) == 34 and one.startswith("s-") and int(one[2:], 16) >= 0 for one in ids)


def test_no_identity_header_of_a_client_reaches_the_worker() -> None:
    client = CIMultiDict(
        {
            "Authorization": "Bearer client-key",
            "X-Gpumeter-Tenant": "bolt",
            "X-Gpumeter-Session": "s-stolen",
            "X-Forwarded-For": "10.0.0.1",
            "Forwarded": "for=10.0.0.1",
            "X-Real-IP": "10.0.0.1",
            "X-Remote-User": "root",
            "Cookie": "a=b",
            "Connection": "close, X-Request-Id",
            "Transfer-Encoding": "chunked",
            "X-Request-Id": "mine",
            "Host": "evil",
            "accept": "text/event-stream",
            "traceparent": "00-1-2-01",
        }
    )
    assert hop.headers_to_worker(client, "TOKEN") == {
        "Accept": "text/event-stream",
        "traceparent": "00-1-2-01",
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
        "Authorization": "Bearer TOKEN",
    }


def test_only_named_headers_of_a_worker_reach_the_client() -> None:
    worker = CIMultiDict(
        {"content-type": "text/event-stream", "retry-after": "3", "server": "uvicorn", "set-cookie": "a"}
    )
    assert hop.headers_to_client(worker) == {"Content-Type": "text/event-stream", "Retry-After": "3"}


def test_a_request_id_is_cut_and_must_be_printable() -> None:
    assert hop.request_id({"X-Request-Id": "r" * 500}) == "r" * 128
    assert hop.request_id({"X-Request-Id": "a\tb"}) == ""
    assert hop.request_id({}) == ""


def test_errors_have_openais_shape_in_bodies_and_in_streams() -> None:
    why = Refusal(503, "no_ready_worker", "Nobody is there.", retry_after_s=5)
    shape = (
        b'{"error": {"message": "Nobody is there.", "type": "server_error", "param": null, "code": "no_ready_worker"}}'
    )
    assert refusal.body(why) == shape
    assert refusal.event(why) == b"data: " + shape + b"\n\n"
    assert Refusal(404, "x", "y").kind == "invalid_request_error"
    assert Refusal(401, "x", "y").kind == "authentication_error"


# Events


def test_whole_events_pass_at_once_and_a_begun_one_waits_for_its_end() -> None:
    cutter = EventCutter()
    assert cutter.feed(b"data: 1\n\ndata: 2\n\nda") == b"data: 1\n\ndata: 2\n\n"
    assert cutter.feed(b"ta: 3\n") == b""
    assert cutter.feed(b"\n") == b"data: 3\n\n"
    assert cutter.rest == b""


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_however_a_stream_is_cut_nothing_is_lost_or_reordered(size: int, newline: bytes) -> None:
    stream = (b"data: {}N" + b"N").replace(b"N", newline) * 5 + b"data: [DONE]" + newline * 2
    cutter = EventCutter()
    parts = [cutter.feed(stream[at : at + size]) for at in range(0, len(stream), size)]
    assert b"".join(parts) == stream
    assert all(part == b"" or part.endswith(newline * 2) for part in parts)
    assert cutter.ended


def test_a_stream_has_ended_after_done_or_an_error_and_not_before() -> None:
    for events, ended in (
        (b'data: {"choices": []}\n\n', False),
        (b"data: [DONE]\n\n", True),
        (b"data: [DONE]\n\n: heartbeat\n\n", True),
        (b'data: {"error": {"message": "x"}}\n\n', True),
        (b'data: {"text": "[DONE]"}\n\n', False),
        (b'data: {"text": "\\"error\\""}\n\n', False),
    ):
        cutter = EventCutter()
        cutter.feed(events)
        assert cutter.ended is ended, events


def test_an_event_without_end_is_not_kept_for_ever() -> None:
    cutter = EventCutter()
    with pytest.raises(EventTooLong):
        for _ in range(3):
            cutter.feed(b"x" * (MAX_EVENT_BYTES // 2))
