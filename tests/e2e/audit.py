"""An auditor who does not trust the product: recomputes a bill from raw rows, pods' statuses and reports.

Owns a second, independent reading of the design: imports nothing of the project, only sqlite3, json and SHA-256.
`allocated` comes from what the test itself saw in the pods' statuses, not from what the collector wrote down.
"""

import json
import sqlite3
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

SECOND_NS = 10**9
GENESIS = "0" * 64
OWN_ACCOUNTS = ("init", "load", "warmup", "nonbillable", "idle", "host_gap", "drain")


@dataclass(frozen=True)
class Life:
    """One life of a worker's container, as the pod's status told the test."""

    pod_uid: str
    pod: str
    container_id: str
    started_ns: int
    ended_ns: int
    exit_code: int


@dataclass
class Books:
    """What the raw rows of the ledger say of one worker pod, in nanoseconds."""

    attributed: int = 0
    slices: int = 0
    own: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seals: list[tuple[int, str]] = field(default_factory=list)
    boots: list[int] = field(default_factory=list)


def rows_of(ledger: Path) -> list[dict[str, Any]]:
    """Every record as its raw bytes say; the derived columns are checked against them on the way."""
    with sqlite3.connect(ledger) as connection:
        connection.row_factory = sqlite3.Row
        stored = connection.execute("SELECT * FROM records ORDER BY worker_uid, boot_id, seq").fetchall()
    records = []
    for row in stored:
        record = json.loads(row["body"])
        for column in ("worker_uid", "boot_id", "seq", "tenant", "session_id", "gpu_ns", "ended_at", "account", "kind"):
            assert record[column] == row[column], (
                f"{column} of {record['boot_id']}/{record['seq']} is not what was sent"
            )
        records.append(record | {"hash": row["hash"], "body": bytes(row["body"])})
    return records


def broken_chains(records: list[dict[str, Any]]) -> list[str]:
    """A sentence for every record that does not follow its neighbour: missing, doubled, changed or reordered."""
    found = []
    heads: dict[tuple[str, str], tuple[int, str]] = {}
    for record in records:
        boot = (record["worker_uid"], record["boot_id"])
        seq, head = heads.get(boot, (0, GENESIS))
        if record["seq"] != seq + 1:
            found.append(f"{boot}: {record['seq']} follows {seq}")
        if record["hash"] != sha256(head.encode() + record["body"]).hexdigest():
            found.append(f"{boot}: the hash of {record['seq']} is wrong")
        heads[boot] = (record["seq"], record["hash"])
    return found


def books_by_pod(records: list[dict[str, Any]]) -> dict[str, Books]:
    """The sums of every worker's records."""
    books: dict[str, Books] = defaultdict(Books)
    first_of: dict[tuple[str, str], int] = {}
    for record in records:
        one = books[record["worker_uid"]]
        boot = (record["worker_uid"], record["boot_id"])
        first_of[boot] = min(first_of.get(boot, record["started_at"]), record["started_at"])
        if record["kind"] == "seal":
            one.seals.append((record["ended_at"], record["status"]))
        elif record["kind"] == "session":
            one.slices += record["gpu_ns"]
        elif record["account"] == "attributed":
            one.attributed += record["gpu_ns"]
        else:
            one.own[record["account"]] += record["gpu_ns"]
    for (worker_uid, _), started_ns in first_of.items():
        books[worker_uid].boots.append(started_ns)
    return books


def accounts_of(lives: list[Life], books: Books) -> dict[str, int]:
    """The whole life of one pod: allocated by Kubernetes, the accounts by its records, the rest unaccounted."""
    allocated = sum(life.ended_ns - life.started_ns for life in lives)
    tail = 0
    for sealed_ns, status in books.seals:
        if status == "drained":
            life = max((life for life in lives if life.started_ns <= sealed_ns), key=lambda life: life.started_ns)
            tail += max(0, life.ended_ns - sealed_ns)
    accounts = {name: books.own[name] for name in OWN_ACCOUNTS} | {"attributed": books.slices}
    accounts["drain"] += tail
    return accounts | {"allocated": allocated, "unaccounted": allocated - sum(accounts.values())}


def sessions_of(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every session's tenant, measured time, tokens and end."""
    sessions: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["kind"] != "session":
            continue
        one = sessions.setdefault(
            record["session_id"],
            {"tenant": record["tenant"], "gpu_ns": 0, "completion_tokens": 0, "status": "open", "ends": 0},
        )
        assert one["tenant"] == record["tenant"], f"session {record['session_id']} has two tenants"
        one["gpu_ns"] += record["gpu_ns"]
        one["completion_tokens"] += record["completion_tokens"]
        if record["status"] != "open":
            one["status"], one["ends"] = record["status"], one["ends"] + 1
    return sessions


def tenant_sums(records: list[dict[str, Any]], start_ns: int, end_ns: int) -> dict[str, int]:
    """GPU-nanoseconds by tenant of what ended after `start_ns` and at or before `end_ns`."""
    sums: dict[str, int] = defaultdict(int)
    for record in records:
        if record["kind"] == "session" and start_ns < record["ended_at"] <= end_ns:
            sums[record["tenant"]] += record["gpu_ns"]
    return sums


def lives_of(statuses: list[dict[str, Any]]) -> list[Life]:
    """Every life of every `main` container that these pod objects, seen over time, tell of; only lives that ended."""
    lives: dict[tuple[str, str], Life] = {}
    for pod in statuses:
        for container in pod.get("status", {}).get("containerStatuses", []):
            for state in (container.get("state", {}), container.get("lastState", {})):
                ended = state.get("terminated")
                if container["name"] == "main" and ended and ended.get("startedAt") and ended.get("finishedAt"):
                    key = (pod["metadata"]["uid"], ended["containerID"])
                    lives[key] = Life(
                        *(pod["metadata"]["uid"], pod["metadata"]["name"], ended["containerID"]),
                        nanoseconds(ended["startedAt"]),
                        nanoseconds(ended["finishedAt"]),
                        ended["exitCode"],
                    )
    return sorted(lives.values(), key=lambda life: (life.pod_uid, life.started_ns))


def nanoseconds(text: str) -> int:
    """A time as Kubernetes writes it."""
    return int(datetime.fromisoformat(text).timestamp()) * SECOND_NS
