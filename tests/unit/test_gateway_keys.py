import base64

from gpumeter_operator.gateway.keys import digest_of, keyring_from, tenant_of


def key_secret(name: str, tenant: str, key: str = "", **changes: object) -> dict[str, object]:
    digest = base64.b64encode(digest_of(key or name).encode()).decode()
    return {
        "metadata": {
            "namespace": "gpumeter",
            "name": name,
            "labels": {"gpumeter.io/api-key": "true", "gpumeter.io/tenant": tenant},
        },
        "data": {"sha256": digest},
    } | changes


def test_a_key_belongs_to_the_tenant_of_its_secret() -> None:
    keyring = keyring_from([key_secret("a", "acme", "gm-1"), key_secret("b", "bolt", "gm-2")])
    assert tenant_of(keyring, "Bearer gm-1") == "acme"
    assert tenant_of(keyring, "bearer  gm-2 ") == "bolt"
    assert keyring.ignored == ()


def test_a_tenant_may_have_several_keys_and_the_same_key_twice() -> None:
    keyring = keyring_from([key_secret("a", "acme", "1"), key_secret("b", "acme", "2"), key_secret("c", "acme", "2")])
    assert [tenant_of(keyring, f"Bearer {key}") for key in "12"] == ["acme", "acme"]
    assert keyring.ignored == ()


def test_unknown_empty_and_differently_schemed_keys_have_no_tenant() -> None:
    keyring = keyring_from([key_secret("a", "acme", "gm-1")])
    for authorization in ("", "Bearer", "Bearer ", "Bearer gm-2", "Basic gm-1", "gm-1", f"Bearer {digest_of('gm-1')}"):
        assert tenant_of(keyring, authorization) is None


def test_one_key_of_two_tenants_belongs_to_neither_and_all_its_secrets_are_named() -> None:
    keyring = keyring_from([key_secret("a", "acme", "same"), key_secret("b", "bolt", "same"), key_secret("c", "acme")])
    assert tenant_of(keyring, "Bearer same") is None
    assert tenant_of(keyring, "Bearer c") == "acme"
    assert [(one.name, one.reason) for one in keyring.ignored] == [("a", "ApiKeyShared"), ("b", "ApiKeyShared")]
    (sentence,) = {one.message for one in keyring.ignored}
    assert "gpumeter/a, gpumeter/b" in sentence and "acme, bolt" in sentence


def test_malformed_secrets_are_skipped_each_with_one_sentence_that_names_it() -> None:
    broken = [
        key_secret("no-data", "acme", data=None),
        key_secret("no-hash", "acme", data={"sha256": base64.b64encode(b"gm-plain-key").decode()}),
        key_secret("no-base64", "acme", data={"sha256": "%%%"}),
        key_secret("reserved", "platform"),
        key_secret("upper", "Acme"),
        key_secret("long", "a" * 41),
        key_secret("unlabelled", ""),
    ]
    keyring = keyring_from([*broken, key_secret("good", "acme", "gm-1")])
    assert tenant_of(keyring, "Bearer gm-1") == "acme"
    assert len(keyring.tenants) == 1
    names = {secret["metadata"]["name"] for secret in broken}  # type: ignore[index]
    assert len(keyring.ignored) == len(broken) and {one.name for one in keyring.ignored} == names
    for one in keyring.ignored:
        assert one.reason == "ApiKeyInvalid" and f"gpumeter/{one.name} " in one.message


def test_a_secret_that_is_being_deleted_is_revoked_already() -> None:
    secret = key_secret("a", "acme", "gm-1")
    secret["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:00Z"  # type: ignore[index]
    assert tenant_of(keyring_from([secret]), "Bearer gm-1") is None


def test_a_hash_may_end_with_a_newline_and_be_in_upper_case() -> None:
    secret = key_secret("a", "acme", "gm-1")
    secret["data"] = {"sha256": base64.b64encode(digest_of("gm-1").upper().encode() + b"\n").decode()}
    assert tenant_of(keyring_from([secret]), "Bearer gm-1") == "acme"
