"""Digests: what is signed, that it is made once and exported, and that an auditor can check it with his own tools."""

import asyncio
import json
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from shutil import copyfile

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gpumeter_operator.adapters import digest_file
from gpumeter_operator.adapters.digest_file import FileUnusable
from gpumeter_operator.adapters.ledger import digests as kept
from gpumeter_operator.adapters.ledger import rollups
from gpumeter_operator.adapters.ledger.days import DAY_NS
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.adapters.ledger.retention import remove_old
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.digest import entry_of
from gpumeter_operator.billing.lineage import FinalReport, lineage
from gpumeter_operator.billing.merkle import root_of
from gpumeter_operator.billing.signing import KeyInvalid, SigningKey, public_pem, signing_key
from gpumeter_operator.cli.collector_settings import read_settings
from gpumeter_operator.cli.digests import digests as command
from gpumeter_operator.environment import SettingsInvalid
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_operator.flow.digests import Digester
from gpumeter_usage.period import MINUTE_NS, SECOND_NS, Granularity
from gpumeter_usage.record import Account
from rigs.audited import (
    DIGESTED_NS,
    HOUR_NS,
    PRIVATE_PEM,
    audited,
    digested,
    fill,
    found,
    key,
    made,
    opened_up,
    run,
)
from rigs.databases import Database
from rigs.ledger import START_NS, FakeWorker, ended, inline, open_ledger, started, worker

DOC = Path(__file__).parents[2] / "docs" / "audit.md"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("ledger") / "ledger.db")


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    copyfile(whole.with_suffix(".jsonl"), tmp_path / "ledger.jsonl")
    copyfile(whole, tmp_path / "ledger.db")
    return tmp_path / "ledger.db"


def another_key() -> SigningKey:
    private = Ed25519PrivateKey.from_private_bytes(b"C" * 32)
    return signing_key(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def public_file(folder: Path, *keys: SigningKey) -> str:
    (folder / "keys.pem").write_text("".join(f"# {each.key_id}\n{public_pem(each.public_der)}" for each in keys))
    return str(folder / "keys.pem")


def test_the_root_is_that_of_rfc_6962() -> None:
    """The test vectors of the Certificate Transparency reference, whose leaves these are."""
    leaves = [bytes.fromhex(each) for each in ("", "00", "10", "2021", "3031", "40414243")]
    roots = (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    )
    assert tuple(root_of(leaves[:count]) for count in range(7)) == tuple(enumerate(roots))


def test_every_final_period_has_one_digest_and_a_second_round_makes_none(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db")
    fill(ledger)
    digested(ledger)
    entries = [entry_of(each.digest.body) for each in kept.kept(ledger.engine)]
    finals = {(*service, end_ns) for service in ledger.services() for end_ns, _, _ in ledger.final_reports(*service)}
    assert sorted((each.namespace, each.service, each.period_end_ns) for each in entries) == sorted(finals)
    assert [each.seq for each in entries] == list(range(1, len(entries) + 1))
    digested(ledger, DIGESTED_NS + SECOND_NS)
    assert len(list(kept.kept(ledger.engine))) == len(entries)


def test_a_fact_that_comes_between_two_digests_is_covered_by_the_second(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db")
    fill(ledger)
    digested(ledger)
    ledger.raise_alarm("LateRecords", "pod-uid-1", "Something new.", DIGESTED_NS + SECOND_NS)
    assert audited(ledger) == [], "it is newer than the last digest"
    fake = FakeWorker(worker(3), DIGESTED_NS)
    fake.spend(Account.IDLE, DIGESTED_NS + 50 * SECOND_NS)
    ledger.observe(fake.identity, [started("c-9", DIGESTED_NS)], DIGESTED_NS + SECOND_NS)
    ledger.take(fake.identity, fake.page("boot-1", 0), DIGESTED_NS + 55 * SECOND_NS)
    Closer(ledger, 10 * SECOND_NS).close_all(Pricing({}, {}), DIGESTED_NS + 80 * SECOND_NS)
    before = kept.covered_count(ledger.engine, kept.COVERED[1])
    digested(ledger, DIGESTED_NS + 90 * SECOND_NS)
    assert kept.COVERED[1].name == "alarms"
    assert kept.covered_count(ledger.engine, kept.COVERED[1]) == before + 1
    assert found(tmp_path / "ledger.db") == []


def test_every_final_report_names_the_tenant_s_report_before_it(whole: Path) -> None:
    reader = Reader(f"sqlite:///{whole}")
    heads: dict[tuple[str, str, str], str] = {}
    chained = 0
    for service in reader.services():
        kinds = {"": [(end, tenant, body) for end, tenant, body in reader.final_reports(*service)]}
        for kind in (Granularity.DAY, Granularity.MONTH):
            kinds[kind] = rollups.rollup_bodies(reader.engine, service, kind, 0)
        for kind, reports in kinds.items():
            for _, tenant, body in reports:
                key = (service[1], kind, tenant)
                assert json.loads(body)["status"]["previousDigest"] == heads.get(key, "0" * 64), key
                chained += key in heads
                heads[key] = sha256(body).hexdigest()
    assert chained >= 4, "no chain has two links"


def test_a_report_that_was_changed_breaks_the_chain_of_those_after_it(path: Path) -> None:
    raw = opened_up(path, path.with_name("changed.db"))
    where = "service = 'smollm2' AND tenant = 'acme' AND phase = 'Final'"
    ((first, body),) = raw.execute(
        f"SELECT rowid, body FROM reports WHERE {where} ORDER BY period_end_ns LIMIT 1"
    ).fetchall()
    forged = bytes(body).replace(b'"sessions":', b'"sessions":1')
    assert forged != body
    raw.execute("UPDATE reports SET body = ?, digest = ? WHERE rowid = ?", (forged, sha256(forged).hexdigest(), first))
    raw.close()
    told = [each for each in found(path.with_name("changed.db")) if each["reason"] == "ReportChain"]
    assert len(told) == 1 and "acme's report names" in told[0]["message"]


def test_reports_of_a_version_that_chained_none_are_no_fault_and_the_chain_begins_after_them(tmp_path: Path) -> None:
    """Three minutes, of which the first was closed by a version that wrote no previousDigest."""
    links: list[FinalReport] = []
    for minute, before in enumerate((None, "head", "head"), start=1):
        status = {"figure": minute}
        if before:
            status["previousDigest"] = sha256(links[-1][2]).hexdigest()  # type: ignore[assignment]
        links.append((minute, "acme", json.dumps({"status": status}).encode()))
    assert lineage(links).breaks == ()
    assert lineage(links).since_ns == 2
    assert len(lineage([*links[:2], (3, "acme", b'{"status":{}}')]).breaks) == 1, "once begun, it goes on"
    assert len(lineage([links[1], links[0], links[2]]).breaks) == 3
    assert len(lineage([links[0], links[2]]).breaks) == 1, "one was taken out"


def test_a_gap_that_was_put_in_to_hide_what_was_taken_out_is_found(path: Path) -> None:
    raw = opened_up(path, path.with_name("changed.db"))
    uid, boot, end_ns = raw.execute(
        "SELECT worker_uid, boot_id, MIN(booked_end_ns) FROM records WHERE service = 'team-a/smollm2'"
    ).fetchone()
    digest = raw.execute("SELECT hash FROM records WHERE worker_uid = ? AND boot_id = ? AND seq = 3", (uid, boot))
    gap = (uid, boot, 2, 3, digest.fetchone()[0], end_ns - MINUTE_NS, end_ns, "They are gone.")
    raw.execute("DELETE FROM records WHERE worker_uid = ? AND boot_id = ? AND seq IN (2, 3)", (uid, boot))
    for made_ns, expected in ((DIGESTED_NS + SECOND_NS, "RecordsRoot"), (START_NS, "GapUnproved")):
        raw.execute("DELETE FROM gaps WHERE worker_uid = ?", (uid,))
        raw.execute(f"INSERT INTO gaps VALUES ({', '.join('?' * 9)})", (*gap, made_ns))
        told = {each["reason"] for each in found(path.with_name("changed.db"))}
        assert expected in told and "RecordsRoot" in told and "RecordDiffers" not in told, told
    raw.close()


def test_a_clock_that_was_ahead_and_is_right_again_makes_nobody_a_forger(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db")
    fill(ledger)
    ahead_ns, right_ns = DIGESTED_NS, DIGESTED_NS - 3 * HOUR_NS
    digester = Digester(ledger, inline, key(), None)
    asyncio.run(digester.run(ahead_ns))
    ledger.raise_alarm("LateRecords", "pod-uid-1", "Came when the clock was right.", right_ns)
    assert audited(ledger, right_ns + 50 * MINUTE_NS) == [], "three hours before the last digest, and no older than it"
    asyncio.run(digester.run(right_ns + SECOND_NS))
    assert audited(ledger, right_ns + 4 * HOUR_NS) == [], "it stands in a digest before anybody can doubt it"
    many = len(list(kept.kept(ledger.engine)))
    ledger.raise_alarm("LateRecords", "pod-uid-1", "And another.", right_ns + 2 * SECOND_NS)
    for second in range(3, 60):
        asyncio.run(digester.run(right_ns + second * SECOND_NS))
    assert len(list(kept.kept(ledger.engine))) == many, "the last digest is of the right time again"
    assert audited(ledger, right_ns + 4 * HOUR_NS) == []
    ledger.raise_alarm("LateRecords", "pod-uid-1", "Put in as an old one.", right_ns - 2 * HOUR_NS)
    assert [each.reason for each in audited(ledger, right_ns + 20 * MINUTE_NS)] == ["FactInserted"]


def test_more_facts_than_a_digest_takes_go_into_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "FACTS_PER_DIGEST", 7)
    ledger = open_ledger(tmp_path / "ledger.db")
    fill(ledger)
    digested(ledger)
    entries = [entry_of(each.digest.body) for each in kept.kept(ledger.engine)]
    assert max(each.facts for each in entries) == 7
    assert entries[-1].service == "", "what is left when all periods have theirs"
    assert found(tmp_path / "ledger.db") == []


def test_without_a_key_there_are_no_digests_and_verify_says_so(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.db")
    fill(ledger)
    asyncio.run(Digester(ledger, inline, None, None).run(DIGESTED_NS))
    told = audited(ledger)
    assert {each.reason for each in told} == {"PeriodWithoutDigest"}


def test_digests_of_two_keys_are_verified_each_by_its_own(path: Path, tmp_path: Path) -> None:
    ledger = open_ledger(path)
    fake = FakeWorker(worker(3), DIGESTED_NS)
    fake.spend(Account.IDLE, DIGESTED_NS + MINUTE_NS)
    ledger.observe(fake.identity, [started("c-9", DIGESTED_NS)], DIGESTED_NS + SECOND_NS)
    ledger.take(fake.identity, fake.page("boot-1", 0), DIGESTED_NS + MINUTE_NS)
    ledger.settle("pod-uid-3", DIGESTED_NS + MINUTE_NS)
    Closer(ledger, 10 * SECOND_NS).close_all(Pricing({}, {}), DIGESTED_NS + 80 * SECOND_NS)
    digested(ledger, DIGESTED_NS + 90 * SECOND_NS, path.with_suffix(".jsonl"), another_key())
    assert found(path, "--digests", str(path.with_suffix(".jsonl"))) == []
    both = public_file(tmp_path, key(), another_key())
    assert found(path, "--public-key", both) == []
    told = found(path, "--public-key", public_file(tmp_path, key()))
    assert {each["reason"] for each in told} == {"KeyUnknown"}


def test_whoever_signs_anew_with_a_key_of_his_own_is_found_by_the_pinned_one(path: Path, tmp_path: Path) -> None:
    raw = opened_up(path, tmp_path / "forged.db")
    raw.execute("UPDATE records SET tenant = 'beta-corp' WHERE tenant = 'acme'")
    for table in ("digests", "digest_facts", "signing_keys"):
        raw.execute(f"DELETE FROM {table}")
    raw.close()
    ledger = open_ledger(tmp_path / "forged.db")
    digested(ledger, by=another_key())
    told = found(tmp_path / "forged.db", "--public-key", public_file(tmp_path, key()))
    assert told[0]["reason"] == "KeyUnknown"


def test_an_export_that_was_cut_short_is_mended_and_goes_on(path: Path) -> None:
    file = path.with_suffix(".jsonl")
    exported = file.read_bytes()
    ledger = Ledger(f"sqlite:///{path}")
    file.write_bytes(exported[:-200])
    last = digest_file.last(file)
    assert last is not None and entry_of(last.body).seq == exported.count(b"\n") - 1
    asyncio.run(Digester(ledger, inline, None, file).run(DIGESTED_NS))
    assert file.read_bytes() == exported
    done = CliRunner().invoke(command, ["export", "--after", "2", "--ledger", f"sqlite:///{path}"])
    assert done.stdout_bytes == exported.split(b"\n", 2)[2]
    file.write_text("a shopping list\n")
    with pytest.raises(FileUnusable, match="does not end with a digest"):
        digest_file.last(file)


def _goes_on(ledger: Ledger, file: Path, pod: int, minute: int) -> None:
    """One more pod's period becomes Final and is digested."""
    at_ns = DIGESTED_NS + minute * MINUTE_NS
    fake = FakeWorker(worker(pod), at_ns)
    fake.spend(Account.IDLE, at_ns + MINUTE_NS)
    ledger.observe(fake.identity, [started(f"c-{pod}", at_ns), ended(f"c-{pod}", at_ns + MINUTE_NS)], at_ns + MINUTE_NS)
    ledger.take(fake.identity, fake.page("boot-1", 0), at_ns + MINUTE_NS)
    ledger.settle(fake.identity.worker_uid, at_ns + MINUTE_NS)
    Closer(ledger, SECOND_NS).close_all(Pricing({}, {}), at_ns + 80 * SECOND_NS)
    digested(ledger, at_ns + 90 * SECOND_NS, file)


def test_a_restored_copy_begins_a_new_file_of_digests_and_keeps_the_old_one(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, copy = path.with_suffix(".jsonl"), tmp_path / "copy.db"
    copyfile(path, copy)
    first = Ledger(f"sqlite:///{path}")
    _goes_on(first, file, 7, 0)
    first.close()
    old = file.read_bytes()

    restored = Ledger(f"sqlite:///{copy}")
    assert digest_file.last(file) is not None
    _goes_on(restored, file, 8, 10)
    _goes_on(restored, file, 9, 20)
    [aside] = file.parent.glob("*.until-*.jsonl")
    assert aside.read_bytes() == old, "what was exported before is kept to the byte"
    assert [reason for reason, _, _ in restored.alarms()].count("DigestsForked") == 1
    assert f"The file is kept as {aside.name}, and {file.name} is begun anew." in caplog.text
    restored.close()
    assert found(copy, "--digests", str(file)) == [], "the new file is whole from its first line on"
    assert {each["reason"] for each in found(copy, "--digests", str(aside))} == {"ExportDiffers"}


def test_a_restored_copy_that_is_as_long_as_the_file_by_then_is_told_apart_too(path: Path, tmp_path: Path) -> None:
    file, copy = path.with_suffix(".jsonl"), tmp_path / "copy.db"
    copyfile(path, copy)
    first, restored = Ledger(f"sqlite:///{path}"), Ledger(f"sqlite:///{copy}")
    _goes_on(first, file, 7, 0)
    _goes_on(restored, tmp_path / "elsewhere.jsonl", 8, 10)  # digests of the same numbers
    asyncio.run(Digester(restored, inline, None, file).run(DIGESTED_NS + HOUR_NS))
    assert len(list(file.parent.glob("*.until-*.jsonl"))) == 1
    assert file.read_bytes() == (tmp_path / "elsewhere.jsonl").read_bytes()
    for ledger in (first, restored):
        ledger.close()


def test_a_ledger_that_was_lost_whole_leaves_the_file_as_it_is_under_another_name(path: Path, tmp_path: Path) -> None:
    file = path.with_suffix(".jsonl")
    old = file.read_bytes()
    empty = open_ledger(tmp_path / "empty.db")
    for _ in range(2):
        digested(empty, DIGESTED_NS, file)
    empty.close()
    [aside] = file.parent.glob("*.until-*.jsonl")
    assert (aside.read_bytes(), file.exists() and old in file.read_bytes()) == (old, False)


def test_a_ledger_that_lost_its_end_shows_beside_the_exported_file_only(path: Path, tmp_path: Path) -> None:
    exported = path.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "more.jsonl").write_text("".join(exported) + exported[-1])
    assert found(path) == []
    told = found(path, "--digests", str(tmp_path / "more.jsonl"))
    assert [each["reason"] for each in told] == ["ExportDiffers"]


def test_a_file_is_checked_offline_and_what_was_changed_in_it_is_named(path: Path, tmp_path: Path) -> None:
    file, pem = path.with_suffix(".jsonl"), public_file(tmp_path, key())
    arguments = ("--offline", "--digests", str(file), "--public-key", pem)
    assert run(tmp_path / "absent.db", *arguments).exit_code == 0
    lines = file.read_text().splitlines()
    file.write_text("\n".join((lines[0], lines[2], lines[1], *lines[3:])) + "\n")
    told = run(tmp_path / "absent.db", *arguments)
    assert told.exit_code == 1
    assert "DigestMissing: digest 3: follows digest 1" in told.output
    assert run(tmp_path / "absent.db", "--offline").exit_code == 2


def test_the_first_row_that_differs_is_named_with_what_to_do(path: Path, tmp_path: Path) -> None:
    raw = opened_up(path, tmp_path / "changed.db")
    raw.execute("UPDATE containers SET at_ns = at_ns + 5 WHERE container_id = 'c-1' AND event = 'ended'")
    raw.close()
    told = run(tmp_path / "changed.db")
    assert told.exit_code == 1
    first = told.output.splitlines()[0]
    assert first.startswith(
        "FIRST    FactChanged: containers (pod-uid-1 c-1 ended): at_ns is 1795255285000000005, digest 1"
    )
    assert "Restore the ledger from a backup" in told.output
    assert told.output.splitlines()[-1] == "ledger verified: NO"
    data = json.loads(run(tmp_path / "changed.db", "--json").stdout)
    assert (data["verified"], data["first"]["reason"]) == (False, "FactChanged")


def test_a_span_looks_at_its_own_periods_only(path: Path, tmp_path: Path) -> None:
    raw = opened_up(path, tmp_path / "changed.db")
    raw.execute(
        "UPDATE records SET gpu_ns = gpu_ns + 1 WHERE worker_uid = 'pod-uid-1' AND seq = 2 AND boot_id = 'boot-1'"
    )
    raw.close()
    assert found(tmp_path / "changed.db", "--since", "2026-11-21T10:01:00Z") == []
    told = found(tmp_path / "changed.db", "--until", "2026-11-21T10:01:00Z")
    assert "boot boot-1 seq 2: the column gpu_ns" in told[0]["message"]
    assert run(path, "--since", "1h", "--until", "2h").exit_code == 2


def test_a_report_that_no_fold_gives_is_found_though_all_its_hashes_are_right(path: Path, tmp_path: Path) -> None:
    raw = opened_up(path, tmp_path / "changed.db")
    where = "tenant = '_platform' AND phase = 'Final' AND service = 'smollm2'"
    body = raw.execute(f"SELECT body FROM reports WHERE {where}").fetchone()[0]
    forged = body.replace(b"WithinBound", b"WithinBounds")
    raw.execute("UPDATE reports SET body = ?, digest = ? WHERE body = ?", (forged, sha256(forged).hexdigest(), body))
    raw.close()
    assert forged != body
    assert "ReportBytes" in {each["reason"] for each in found(tmp_path / "changed.db")}


def test_a_wrong_signing_key_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "master").write_bytes(b"k" * 32)
    (tmp_path / "rsa.pem").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    environment = {"GPUMETER_MASTER_KEY_FILE": str(tmp_path / "master")}
    for file, told in ((tmp_path / "rsa.pem", "no private key in PEM"), (tmp_path / "none.pem", "cannot be read")):
        with pytest.raises(SettingsInvalid, match=told):
            read_settings(environment | {"GPUMETER_SIGNING_KEY_FILE": str(file)})
    (tmp_path / "key.pem").write_bytes(PRIVATE_PEM)
    settings = read_settings(environment | {"GPUMETER_SIGNING_KEY_FILE": str(tmp_path / "key.pem")})
    assert settings.signing_key is not None
    with pytest.raises(KeyInvalid, match="openssl genpkey -algorithm ed25519"):
        signing_key(b"nothing")


def script() -> str:
    [found] = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)
    return str(found)


def test_the_script_of_the_documentation_checks_ledger_and_file_with_openssl(path: Path, tmp_path: Path) -> None:
    (tmp_path / "digests.py").write_text(script())
    keys = CliRunner().invoke(command, ["keys", "--ledger", f"sqlite:///{path}"]).stdout
    assert keys.startswith(f"# {key().key_id}\n-----BEGIN PUBLIC KEY-----")
    (tmp_path / "keys.pem").write_text(keys)

    def check(ledger: Path) -> tuple[int, str]:
        files = (path.with_suffix(".jsonl"), tmp_path / "keys.pem", ledger)
        done = subprocess.run(
            [sys.executable, tmp_path / "digests.py", *files], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    code, told = check(path)
    assert (code, "all right: " in told) == (0, True), told
    for number, (change, expected) in enumerate(
        (
            ("UPDATE records SET hash = '" + "0" * 64 + "' WHERE rowid = 1", "are not those that were signed"),
            ("UPDATE pod_accounts SET idle = idle + 1", "pod_accounts no longer has"),
            ("UPDATE reports SET body = x'00' WHERE rowid = 1", "reports no longer has"),
            ("DELETE FROM digests WHERE seq = 2", "the ledger's digests are not those of the file"),
        )
    ):
        raw = opened_up(path, tmp_path / f"changed-{number}.db")
        raw.execute(change)
        raw.close()
        code, told = check(tmp_path / f"changed-{number}.db")
        assert (code, expected in told) == (1, True), told


def test_the_script_of_the_documentation_finds_nothing_where_retention_removed_records(
    path: Path, tmp_path: Path
) -> None:
    ledger = open_ledger(path)
    [removed] = remove_old(ledger, 90, DIGESTED_NS + 100 * DAY_NS)
    assert removed.records
    ledger.close()
    (tmp_path / "digests.py").write_text(script())
    files = (path.with_suffix(".jsonl"), public_file(tmp_path, key()), path)
    check = [sys.executable, tmp_path / "digests.py", *files]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_one_line_is_checked_with_openssl_alone(path: Path, tmp_path: Path) -> None:
    line = json.loads(path.with_suffix(".jsonl").read_text().splitlines()[-1])
    (tmp_path / "body").write_text(line["body"])
    (tmp_path / "signature").write_bytes(bytes.fromhex(line["signature"]))
    pem = public_file(tmp_path, key())
    check = "openssl pkeyutl -verify -pubin -inkey keys.pem -rawin -in body -sigfile signature"
    assert check in DOC.read_text()
    done = subprocess.run(check.split(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-in", pem, "-outform", "DER"], capture_output=True, check=True
    ).stdout
    assert sha256(der).hexdigest() == json.loads(line["body"])["key_id"] == key().key_id


def test_digests_are_the_same_in_every_database(database: Database, whole: Path) -> None:
    """Roots of the same facts, whichever database orders them."""
    ledger = open_ledger(database.url)
    fill(ledger)
    digested(ledger)
    ledger.close()
    bodies = [each.digest.body for each in kept.kept(Reader(database.url).engine)]
    expected = [each.digest.body for each in kept.kept(Reader(f"sqlite:///{whole}").engine)]
    assert bodies == expected
