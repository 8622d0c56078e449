"""`gpumeter adjust`: book a correction of a Final report in the next open period.

Owns the options and what is printed. Run where the ledger can be written:

    kubectl exec deploy/gpumeter-collector -- gpumeter adjust -n team-a smollm2-acme-20261121t14 \\
      --gpu-ns -1200000000 --reason "INC-42: a probe ran under the tenant's key" --actor alice@example.com
"""

import sys
import time

import click

from gpumeter_operator.adapters.ledger.engine import LedgerUnavailable
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.correct import CorrectionRefused, Wanted
from gpumeter_operator.billing.facts import Tokens
from gpumeter_operator.cli.ledger import LEDGER, ledger_url, open_reader
from gpumeter_operator.cli.span import Moment
from gpumeter_operator.flow.correct import book, weigh


@click.command()
@click.option("--namespace", "-n", required=True, help="The namespace of the report.")
@click.option("--gpu-ns", type=int, help="Nanoseconds that the tenant owes more; negative: gets back.")
@click.option("--prompt-tokens", type=int, help="The same of prompt tokens, where standard rates billed the report.")
@click.option("--cached-tokens", type=int, help="The part of the prompt tokens that came from the prefix cache.")
@click.option("--completion-tokens", type=int, help="The same of tokens of answers.")
@click.option("--reason", required=True, help="Why, in a sentence; it stands in the reports of both sides.")
@click.option("--actor", required=True, help="Who answers for it; it stands in the reports of both sides.")
@click.option("--id", "correction_id", default="", help="An id of your own; default: made of all that is said here.")
@click.option("--gpu-class", default="", help="The class of GPU, where the service had several in that period.")
@click.option("--tenant", default="", help="Who is billed, where he has no report: REPORT is the platform's then.")
@click.option("--model", default="", help="The model of the tokens, where the service had several in that period.")
@click.option(
    "--from", "part", type=Moment(), help="The start of the part that it is of, where the price changed within."
)
@click.option("--dry-run", is_flag=True, help="Say what would be booked, and book nothing.")
@LEDGER
@click.argument("report")
def adjust(
    *,
    namespace: str,
    gpu_ns: int | None,
    prompt_tokens: int | None,
    cached_tokens: int | None,
    completion_tokens: int | None,
    reason: str,
    actor: str,
    correction_id: str,
    gpu_class: str,
    tenant: str,
    model: str,
    part: int | None,
    dry_run: bool,
    ledger: str | None,
    report: str,
) -> None:
    """Correct the Final REPORT of a tenant: it stays as it is, and the difference is booked in the next open period.

    Say by how much GPU time, or by how many tokens where standard rates billed it. The platform's side moves the other
    way. It has the price of what it corrects. Booked once: the same again is refused. Exit code 0; 1 where it is
    refused, 2 where the ledger cannot be written.
    """
    said = (prompt_tokens, cached_tokens, completion_tokens)
    tokens = None if said == (None, None, None) else Tokens(*(each or 0 for each in said))
    if gpu_ns is None and tokens is None:
        raise click.UsageError("Say by how much: with --gpu-ns, or with --prompt-tokens and --completion-tokens.")
    wanted = Wanted(
        namespace=namespace,
        report=report,
        gpu_ns=gpu_ns or 0,
        reason=reason,
        actor=actor,
        gpu_class=gpu_class,
        id=correction_id,
        part_start_ns=part,
        model=model,
        tokens=tokens,
        tenant=tenant,
    )
    try:
        if dry_run:
            click.echo(f"Would book {weigh(open_reader(ledger), wanted, time.time_ns()).told}")
            return
        opened = Ledger(ledger_url(ledger), migrate=False)
        try:
            click.echo(f"Booked {book(opened, wanted, time.time_ns()).told}")
        finally:
            opened.close()
    except CorrectionRefused as refused:
        click.echo(f"{refused.reason}: {refused}", err=True)
        sys.exit(1)
    except LedgerUnavailable as problem:
        click.echo(str(problem), err=True)
        sys.exit(2)
