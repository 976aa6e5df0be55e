"""Runs tests/support/nnunet_side.py with nnU-Net's own Python, or one of its commands; `require_peer("nnunet")` comes
first."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.support.peers import nnunet_python

SCRIPT = Path(__file__).with_name("nnunet_side.py")


def nnunet(command: str, root: Path, **arguments: Any) -> Any:
    """What the command answers. AssertionError with the end of its output when it fails."""
    environment = _environment()
    done = subprocess.run(
        [str(nnunet_python()), str(SCRIPT), command, str(root), json.dumps(arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def nnunet_command(*words: str, results: Path) -> None:
    """A command such as nnUNetv2_predict as its users run it, with nnUNet_results; fails when it does."""
    done = subprocess.run(
        [str(nnunet_python().with_name(words[0])), *words[1:]],
        env={**_environment(), "nnUNet_results": str(results)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "nnUNet_"))}
