"""Where programs cannot be contained they are not run, unless a person says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_ASK = """
import json
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.evaluation.sandbox.isolation import find_sandbox_kind
try:
    find_sandbox_kind()
    refused = ""
except LaunchError as error:
    refused = str(error)
print(json.dumps([refused, find_sandbox_kind(unsafe=True)]))
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare, which forbids namespaces for this test")
def test_a_machine_without_namespaces_is_refused_unless_a_person_says_unsafe() -> None:
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh", sys.executable, "-c", _ASK]
    paths = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=paths)
    if done.returncode:
        pytest.skip(f"user namespaces cannot be had here: {done.stderr.strip()}")
    refused, kind = json.loads(done.stdout)
    assert "cannot be contained on this machine" in refused
    assert "say --unsafe" in refused
    assert kind == "none"


_CHECK_EACH = """
import json
from llm_training_toolkit.evaluation.sandbox.isolation import find_sandbox_problem
from llm_training_toolkit.evaluation.sandbox.run import SandboxLimits, run_program
program = "open('/proc/sys/fs/lease-break-time', 'w').write('46')"
kinds = ("namespaces", "bubblewrap")
problems = {kind: find_sandbox_problem(kind) for kind in kinds}
ends = {kind: run_program(program, kind, SandboxLimits()).end for kind in kinds if not problems[kind]}
print(json.dumps([problems, ends]))
"""
_PYTHON_FOR_ALL = "/usr/bin/python3"  # the one that runs the tests may lie in a home; the sandbox needs no package
STRANGER = 12345


@pytest.mark.slow
@pytest.mark.parametrize("user", ["root", "another user"])
def test_each_containment_holds_for_root_and_for_a_user_and_keeps_the_kernels_settings(
    user: str, tmp_path: Path
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can try it as another user, too")
    if not Path(_PYTHON_FOR_ALL).exists():
        pytest.skip(f"no {_PYTHON_FOR_ALL}, which every user may run")
    setting = Path("/proc/sys/fs/lease-break-time")
    before = setting.read_text()
    source = str(Path(__file__).parents[4] / "src")
    done = subprocess.run(
        [_PYTHON_FOR_ALL, "-B", "-c", _CHECK_EACH],
        user=STRANGER if user != "root" else None,
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": source, "TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or user != "root", done.stderr
    if done.returncode:
        pytest.skip(f"this user cannot run it here: {done.stderr.splitlines()[-1:]}")
    problems, ends = json.loads(done.stdout)
    assert setting.read_text() == before
    assert set(ends.values()) <= {"failed"}
    if not ends:
        pytest.skip(f"no containment can be had here: {problems}")
