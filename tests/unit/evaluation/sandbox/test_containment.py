"""Where programs cannot be contained they are not run, unless a person says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

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
