"""The command line: what is imported when, and what wrong settings look like."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from gpumeter_operator.cli.main import COMMANDS, main


def test_help_lists_every_command_without_importing_any() -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from gpumeter_operator.cli.main import main\n"
        "print(CliRunner().invoke(main, ['--help']).output)\n"
        "heavy = {'kopf', 'lightkube', 'aiohttp', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_a_command_lets_its_process_read_the_deepest_object_and_an_import_changes_nothing() -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "import gpumeter_operator.adapters.kubernetes, gpumeter_operator.main\n"
        "from gpumeter_operator.cli.main import LEVELS_MAX, main\n"
        "assert sys.getrecursionlimit() == 1000, sys.getrecursionlimit()\n"
        "CliRunner().invoke(main, ['gateway', '--help'])\n"
        "assert sys.getrecursionlimit() > 2 * LEVELS_MAX, sys.getrecursionlimit()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_is_said_to_be_unknown() -> None:
    done = CliRunner().invoke(main, ["opreator"])
    assert done.exit_code == 2
    assert "No such command 'opreator'" in done.output


def test_the_operator_tells_every_wrong_setting_and_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPUMETER_WORKER_IMAGE", "GPUMETER_MASTER_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPUMETER_LOG_LEVEL", "loud")
    done = CliRunner().invoke(main, ["operator"])
    assert done.exit_code == 2
    assert "GPUMETER_LOG_LEVEL is 'loud'; set one of debug, info, warning, error." in done.output
    assert "GPUMETER_WORKER_IMAGE is not set; name the image that workers run." in done.output
    assert "GPUMETER_MASTER_KEY_FILE is not set; name the file that holds the release's master key." in done.output
