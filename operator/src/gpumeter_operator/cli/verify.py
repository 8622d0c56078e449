"""`gpumeter verify`: the ledger recomputed from its raw rows, and its digests with their signatures.

Owns what is printed, the progress on a terminal, which keys are believed, and the exit code. Reads the ledger without
changing it, beside a running collector too:

    kubectl exec deploy/gpumeter-collector -- gpumeter verify
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import click

from gpumeter_operator.adapters import digest_file
from gpumeter_operator.adapters.digest_file import FileUnusable
from gpumeter_operator.adapters.ledger import digests
from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.read import Reader
from gpumeter_operator.billing.signing import KeyInvalid, Keyring, merged, public_keys
from gpumeter_operator.cli.collector_settings import SIGNING_KEY_FILE, read_signing_key
from gpumeter_operator.cli.ledger import LEDGER, open_reader
from gpumeter_operator.cli.span import Moment, Month, asked_span
from gpumeter_operator.environment import Environment
from gpumeter_operator.flow.recount import Span, Whole
from gpumeter_operator.flow.verify import Audit, Finding, Tally, verify_file
from gpumeter_operator.flow.verify import verify as find

MOST = 100
"""Findings that are printed: the first tells where to look, and one row may be the cause of a thousand."""


@click.command()
@click.option("--since", type=Moment(), help="Only periods that end after this time, or this long ago.")
@click.option("--until", type=Moment(), help="Only periods that end at this time at the latest.")
@click.option("--month", type=Month(), help="Only the periods of a month, as 2026-11.")
@click.option(
    "--public-key",
    "key_files",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A PEM file with public keys to believe, and no others; may be given several times.",
)
@click.option("--digests", "file", type=click.Path(path_type=Path), help="A file of exported digests to compare with.")
@click.option("--offline", is_flag=True, help="Check the file of --digests alone, without any ledger.")
@click.option("--output", "-o", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--json", "output", flag_value="json", hidden=True)  # its name of before
@click.option("--quiet", "-q", is_flag=True, help="No progress on the terminal.")
@LEDGER
def verify(
    *,
    since: int | None,
    until: int | None,
    month: tuple[int, int] | None,
    key_files: tuple[Path, ...],
    file: Path | None,
    offline: bool,
    output: str,
    quiet: bool,
    ledger: str | None,
) -> None:
    """Recompute the ledger from its raw rows: chains, accounts, reports to the byte, digests and signatures.

    Exit code 0 when all agrees, 1 when anything differs (the first row that does is named first), 2 when the ledger or
    a file cannot be read.
    """
    whole = since is None and until is None and month is None
    span = Whole if whole else Span(*asked_span(since, until, month))
    if offline and file is None:
        raise click.UsageError("--offline checks an exported file: name it with --digests.")
    if offline and not key_files:
        raise click.UsageError("--offline has no ledger to take keys from: name the public key with --public-key.")
    as_data = output == "json"
    tally, shown = Tally(), Shown(quiet=quiet or as_data)
    try:
        pinned = merged(public_keys(_text(path)) for path in key_files)
        if offline and file is not None:
            trust = "the keys of --public-key"
            findings = list(verify_file(digest_file.read(file), Keyring(pinned), tally))
        else:
            reader = open_reader(ledger)
            keys, trust = (pinned, "the keys of --public-key") if pinned else _own_keys(reader)
            given = digest_file.read(file) if file else None
            audit = Audit(reader, Keyring(keys), time.time_ns(), span, given, shown.step)
            found = find(audit, tally)
            findings = list(_told(found, shown, as_data=as_data))
    except (LedgerUnavailable, FileUnusable, KeyInvalid) as problem:
        shown.end()
        click.echo(str(problem), err=True)
        sys.exit(2)
    shown.end()
    click.echo(_as_json(findings, tally, trust) if as_data else _as_text(findings, tally, trust, offline=offline))
    sys.exit(1 if findings else 0)


class Shown:
    """One line on the terminal that says how far it is, at most ten times a second; nothing where there is none."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet or not sys.stderr.isatty()
        self._at_s = 0.0
        self._open = False

    def step(self, what: str, done: int, of: int) -> None:
        """Show it."""
        now_s = time.monotonic()
        if self._quiet or now_s - self._at_s < 0.1:
            return
        self._at_s, self._open = now_s, True
        share = f" of {of:,} ({100 * done // of} %)" if of else ""
        click.echo(f"\r\033[K{what}: {done:,}{share}", nl=False, err=True)

    def end(self) -> None:
        """Leave the line empty."""
        if self._open:
            click.echo("\r\033[K", nl=False, err=True)
            self._open = False


def _told(found: Iterator[Finding], shown: Shown, *, as_data: bool) -> Iterator[Finding]:
    """Each as soon as it is found: a long ledger goes on for minutes. More than a hundred are only counted once."""
    for number, finding in enumerate(islice(found, MOST), start=1):
        if not as_data:
            shown.end()
            click.echo(f"{'FIRST   ' if number == 1 else 'DIFFERS '} {finding.reason}: {finding.message}")
            if number == 1:
                click.echo(f"         {finding.advice}")
        yield finding


def _own_keys(reader: Reader) -> tuple[dict[str, bytes], str]:
    kept = digests.kept_keys(reader.engine)
    read = Environment(os.environ)
    own = read_signing_key(read)
    if own is None:
        return kept, "keys that the ledger itself names; --public-key pins yours"
    trust = f"the key of {SIGNING_KEY_FILE}"
    if kept.keys() - {own.key_id}:
        trust += ", and former ones that the ledger itself names"
    return {**kept, own.key_id: own.public_der}, trust


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyInvalid(f"The public key {path} cannot be read: {error}.") from None


def _as_text(findings: list[Finding], tally: Tally, trust: str, *, offline: bool) -> str:
    lines = []
    if offline:
        lines += [f"DIFFERS  {finding.reason}: {finding.message}" for finding in findings[:MOST]]
        lines += [f"         {findings[0].advice}"] if findings else []
    else:
        lines.append(
            f"{tally.records:,} records, {tally.facts:,} facts, {tally.periods:,} closed periods recomputed from raw "
            f"records, {tally.refolded:,} reports folded anew"
        )
        if tally.only_compared:
            lines.append(
                f"{tally.only_compared:,} closed periods only compared with their digests, days, months and allocated "
                "time: retention removed their records."
            )
        if tally.pending:
            lines.append(f"{tally.pending:,} facts are newer than the last digest; the next one covers them.")
    if tally.digests:
        lines.append(f"{tally.digests:,} digests, the last {tally.last_digest}; believed: {trust}")
    if len(findings) >= MOST:
        lines.append(f"There may be more: it stopped after {MOST}.")
    lines.append(f"ledger verified: {'NO' if findings else 'yes'}")
    return "\n".join(lines)


def _as_json(findings: list[Finding], tally: Tally, trust: str) -> str:
    told = [asdict(finding) | {"advice": finding.advice} for finding in findings[:MOST]]
    looked_at = {
        "records": tally.records,
        "facts": tally.facts,
        "factsAfterTheLastDigest": tally.pending,
        "periods": tally.periods,
        "periodsOnlyCompared": tally.only_compared,
        "reportsFoldedAnew": tally.refolded,
        "digests": tally.digests,
    }
    return json.dumps(
        {
            "verified": not findings,
            "first": told[0] if told else None,
            "findings": told,
            "lookedAt": looked_at,
            "lastDigest": tally.last_digest,
            "believed": trust,
        },
        indent=2,
    )
