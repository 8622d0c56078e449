"""What gateway, ledger and worker agree on about tenants and sessions."""

import pytest

from gpumeter_usage.hop import is_session, new_session
from gpumeter_usage.tenant import tenant_problem


@pytest.mark.parametrize("tenant", ["a", "acme", "team-7", "0", "a" * 40])
def test_a_dns_label_of_forty_characters_is_a_tenant(tenant: str) -> None:
    assert tenant_problem(tenant) == ""


@pytest.mark.parametrize(
    ("tenant", "problem"),
    [
        ("", "at most 40"),
        ("a" * 41, "at most 40"),
        ("Acme", "lower-case"),
        ("-acme", "letter or digit at both ends"),
        ("acme-", "letter or digit at both ends"),
        ("acme\n", "DNS label"),
        ("_platform", "DNS label"),
        ("platform", "reserved name"),
    ],
)
def test_what_cannot_be_a_tenant_is_told_why(tenant: str, problem: str) -> None:
    assert problem in tenant_problem(tenant)


def test_only_what_the_server_itself_makes_is_a_session() -> None:
    assert is_session(new_session())
    for forged in ("", "s-1", "s-" + "A" * 32, "s-" + "a" * 33, "s-" + "a" * 32 + "\n"):
        assert not is_session(forged)
