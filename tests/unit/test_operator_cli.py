"""The command line: what is imported when, and what wrong settings look like."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from gpumeter_operator.cli.main import COMMANDS, deep_objects_problem, main


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


def test_a_python_that_decodes_no_deep_objects_is_told_with_what_to_do_and_another_is_not() -> None:
    asked: list[str] = []

    def stops_in_c(text: str) -> object:
        asked.append(text)
        raise RecursionError("maximum recursion depth exceeded while decoding a JSON array from a unicode string")

    told = deep_objects_problem("3.12.1", stops_in_c)
    assert told is not None
    assert told.startswith("Python 3.12.1 decodes no JSON of 9,990 levels")
    assert told.endswith("run gpumeter on Python 3.11 or 3.13.")
    assert asked == ["[" * 9_990 + "]" * 9_990]
    assert deep_objects_problem("3.13.0", lambda text: []) is None


def test_a_command_that_runs_for_long_asks_its_python_for_deep_objects_and_warns() -> None:
    code = (
        "import json, sys\n"
        "from click.testing import CliRunner\n"
        "from gpumeter_operator.cli import start\n"
        "from gpumeter_operator.cli.main import allow_deep_objects\n"
        "if sys.argv[1] == 'as commands do':\n"
        "    allow_deep_objects()\n"
        "assert start.settings_or_exit(lambda environ: 'settings') == 'settings'\n"
    )
    for given, warned in (("as commands do", False), ("with a limit of 1,000", sys.version_info < (3, 12))):
        done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert ("decodes no JSON of 9,990 levels" in done.stderr) == warned, done.stderr


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
