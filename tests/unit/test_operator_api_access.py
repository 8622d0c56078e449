"""Where the API server is found, and what is said there of who we are."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpumeter_operator.adapters.access import AccessInvalid, of_file, of_service_account


def kubeconfig(folder: Path, **user: Any) -> Path:
    path = folder / "config"
    document = {
        "current-context": "one",
        "contexts": [{"name": "one", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1/"}}],
        "users": [{"name": "u", "user": user}],
    }
    path.write_text(yaml.safe_dump(document))
    return path


async def test_a_token_and_a_password_are_said_as_they_stand(tmp_path: Path) -> None:
    access = of_file(kubeconfig(tmp_path, token="abc"))
    assert (access.server, await access.authorization(False)) == ("http://127.0.0.1:1", "Bearer abc")
    access = of_file(kubeconfig(tmp_path, username="me", password="secret"))
    assert await access.authorization(False) == "Basic bWU6c2VjcmV0"
    assert await of_file(kubeconfig(tmp_path)).authorization(False) == ""


async def test_a_token_that_was_refused_is_read_from_its_file_again(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("first\n")
    access = of_file(kubeconfig(tmp_path, tokenFile="token"))
    assert await access.authorization(False) == "Bearer first"
    (tmp_path / "token").write_text("second\n")
    assert await access.authorization(False) == "Bearer first", "a file is not read for each request"
    assert await access.authorization(True) == "Bearer second"


async def test_a_program_is_asked_once_and_again_when_its_token_is_refused_or_over(tmp_path: Path) -> None:
    program = tmp_path / "program"
    ends = '"2099-01-01T00:00:00Z"'
    program.write_text(
        f"#!{sys.executable}\nimport pathlib\nseen = pathlib.Path({str(tmp_path / 'seen')!r})\n"
        "number = len(seen.read_text()) if seen.exists() else 0\nseen.write_text('x' * (number + 1))\n"
        f'print(\'{{"status": {{"token": "t%d", "expirationTimestamp": {ends}}}}}\' % number)\n'
    )
    program.chmod(0o700)
    entry = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(program)}
    access = of_file(kubeconfig(tmp_path, exec=entry))
    assert [await access.authorization(refused) for refused in (False, False, True)] == [
        "Bearer t0",
        "Bearer t0",
        "Bearer t1",
    ]
    with pytest.raises(AccessInvalid, match="exec without a command"):
        of_file(kubeconfig(tmp_path, exec={"apiVersion": entry["apiVersion"]}))


async def test_a_program_that_fails_is_told_with_its_own_words(tmp_path: Path) -> None:
    entry = {"apiVersion": "client.authentication.k8s.io/v1", "command": "sh", "args": ["-c", "echo no >&2; exit 3"]}
    with pytest.raises(AccessInvalid, match="sh ended with 3: no"):
        await of_file(kubeconfig(tmp_path, exec=entry)).authorization(False)


async def test_a_program_for_whose_answer_nobody_waits_any_more_is_ended(tmp_path: Path) -> None:
    said = tmp_path / "pid"
    entry = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "sh",
        "args": ["-c", 'echo $$ > "$0.new"; mv "$0.new" "$0"; sleep 600', str(said)],
    }
    asks = asyncio.create_task(of_file(kubeconfig(tmp_path, exec=entry)).authorization(False))
    async with asyncio.timeout(20):
        while not said.exists():  # noqa: ASYNC110 - a file of another process
            await asyncio.sleep(0.01)
    asks.cancel()
    await asyncio.wait([asks])
    assert asks.cancelled()
    with pytest.raises(ProcessLookupError):
        os.kill(int(said.read_text()), 0)


async def test_a_program_that_does_not_answer_in_time_is_ended_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpumeter_operator.adapters.access.EXEC_TIMEOUT_S", 1.0)
    said = tmp_path / "pid"
    args = ["-c", 'echo $$ > "$0"; exec sleep 600', str(said)]
    entry = {"apiVersion": "client.authentication.k8s.io/v1", "command": "sh", "args": args}
    with pytest.raises(AccessInvalid, match="sh gives no token: TimeoutError"):
        await of_file(kubeconfig(tmp_path, exec=entry)).authorization(False)
    with pytest.raises(ProcessLookupError):
        os.kill(int(said.read_text()), 0)


async def test_a_program_with_a_slash_in_its_name_lies_beside_the_kubeconfig(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "program"
    program.write_text('#!/bin/sh\necho \'{"status": {"token": "beside"}}\'\n')
    program.chmod(0o700)
    entry = {"apiVersion": "client.authentication.k8s.io/v1", "command": "bin/program"}
    assert await of_file(kubeconfig(tmp_path, exec=entry)).authorization(False) == "Bearer beside"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no kubeconfig"),
        ("{contexts: []}", "'current-context' is missing"),
        ("{current-context: x, contexts: [], clusters: []}", "context 'x'"),
        ("{", "cannot be read"),
    ],
)
def test_a_file_that_leads_nowhere_says_why(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(AccessInvalid, match=why):
        of_file(path)


def test_a_service_account_without_its_parts_says_which_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AccessInvalid, match="KUBERNETES_SERVICE_HOST"):
        of_service_account(tmp_path, {})
    with pytest.raises(AccessInvalid, match=r"ca\.crt|No such file"):
        of_service_account(tmp_path, {"KUBERNETES_SERVICE_HOST": "::1", "KUBERNETES_SERVICE_PORT": "443"})
