"""Who is told of an alarm. Whoever cannot be told is noted, and training goes on."""

from __future__ import annotations

import json
import shlex
import subprocess
from typing import Any

from holdfast.alarms.rules import Alarms

SECONDS = 30
"""How long a webhook or a command may take."""


def tell(rule: Alarms, message: dict[str, Any]) -> list[str]:
    """Send a message to the webhook and the command; returns a line for each that failed."""
    failed = []
    if rule.webhook and (problem := _post(rule.webhook, message)):
        failed.append(f"alarms.webhook: {problem}")
    if rule.command and (problem := _run(rule.command, message)):
        failed.append(f"alarms.command: {problem}")
    return failed


def _post(url: str, message: dict[str, Any]) -> str:
    import requests

    try:
        requests.post(url, json=message, timeout=SECONDS).raise_for_status()
    except (requests.RequestException, ValueError) as error:
        return f"not delivered ({' '.join(str(error).split())[:200]})"
    return ""


def _run(command: str, message: dict[str, Any]) -> str:
    try:
        done = subprocess.run(
            shlex.split(command),
            input=json.dumps(message),
            text=True,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not run ({error})"
    return "" if done.returncode == 0 else f"ended with exit code {done.returncode}"
