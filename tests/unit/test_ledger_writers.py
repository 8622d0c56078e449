"""Commands that write a ledger which a collector owns: they take it as it is, or leave it as it is."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import inspect, text

from gpumeter_operator.cli.adjust import adjust
from gpumeter_operator.cli.journal import journal
from rigs.databases import Database
from rigs.ledger import open_ledger

CREDIT = ("-n", "team-a", "smollm2-acme-20261121t10", "--gpu-ns", "-1", "--reason", "INC-42.", "--actor", "alice")


def each_on(url: str, folder: Path) -> list[Result]:
    """What either command says of a ledger."""
    (folder / "journal.sqlite").touch()
    commands = ((adjust, CREDIT), (journal, (str(folder / "journal.sqlite"),)))
    return [CliRunner().invoke(command, ["--ledger", url, *arguments]) for command, arguments in commands]


@pytest.mark.parametrize(
    ("schema", "told"),
    [("0012", "The ledger has schema 0012, and this gpumeter"), ("9999", "by a newer version of gpumeter (schema")],
)
def test_a_ledger_of_another_schema_is_neither_written_nor_migrated(
    database: Database, tmp_path: Path, schema: str, told: str
) -> None:
    """Its collector, which is of that schema, would not start on it any more."""
    open_ledger(database.url).close()
    database.run("UPDATE alembic_version SET version_num = :schema", schema=schema)
    for done in each_on(database.url, tmp_path):
        assert (done.exit_code != 0, done.stdout) == (True, "")
        assert told in done.stderr
        assert "Traceback" not in done.output
    with database.raw() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == schema


def test_a_mistyped_url_leaves_no_ledger_behind(database: Database, tmp_path: Path) -> None:
    if database.kind == "postgresql":
        database.run("DROP SCHEMA public CASCADE")
        database.run("CREATE SCHEMA public")
    for done in each_on(database.url, tmp_path):
        assert (done.exit_code != 0, done.stdout) == (True, "")
        assert "There is no ledger" in done.stderr
    assert database.file is None or not database.file.exists()
    with database.raw() as connection:
        assert inspect(connection).get_table_names() == []
