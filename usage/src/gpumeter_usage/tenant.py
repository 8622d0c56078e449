"""Tenants: which names there can be, on every side of the product.

Owns the form of a tenant's name and the name that nobody may have. Does not know who the tenants are.
"""

import re

RESERVED_TENANT = "platform"
"""As a label's value and in names of reports this is the platform itself, which owns what no tenant used."""

MAX_TENANT_CHARS = 40
"""A tenant becomes a part of the names of its reports, beside the service's and the period's."""

_TENANT = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


def tenant_problem(tenant: str) -> str:
    """Why this cannot be a tenant, in a sentence without its end; "" where it can."""
    if tenant == RESERVED_TENANT:
        return f"{tenant!r} is the reserved name of the platform's own usage"
    if len(tenant) > MAX_TENANT_CHARS or not _TENANT.fullmatch(tenant):
        return (
            f"{tenant!r:.60} is not a tenant's name, which is a DNS label of at most {MAX_TENANT_CHARS} characters "
            "(lower-case letters, digits and dashes, with a letter or digit at both ends)"
        )
    return ""
