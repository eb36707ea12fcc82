"""Who is told, and what happens where that fails: a line, never an end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from holdfast.alarms import actions
from holdfast.alarms.actions import tell
from holdfast.alarms.rules import Alarms

MESSAGE = {"run": "runs/x", "step": 40, "alarms": [{"name": "canary/web", "text": "rose"}]}


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    """A server on this machine, and what was posted to it; `/broken` answers 500."""
    posted: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if self.path == "/broken" else 200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", posted
        running.shutdown()
        thread.join()


def test_a_webhook_gets_the_message(server: tuple[str, list[Any]]) -> None:
    url, posted = server
    assert tell(Alarms(webhook=url), MESSAGE) == []
    assert posted == [MESSAGE]


def test_a_webhook_that_fails_is_noted(server: tuple[str, list[Any]]) -> None:
    (line,) = tell(Alarms(webhook=f"{server[0]}/broken"), MESSAGE)
    assert line.startswith("alarms.webhook: not delivered")
    assert "500" in line


def test_nobody_at_the_webhook_is_noted() -> None:
    (line,) = tell(Alarms(webhook="http://127.0.0.1:9/"), MESSAGE)
    assert line.startswith("alarms.webhook: not delivered")


def test_a_command_gets_the_message(tmp_path: Path) -> None:
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"
    out = tmp_path / "out of it.json"
    assert tell(Alarms(command=f"{sys.executable} -c '{code}' '{out}'"), MESSAGE) == []
    assert json.loads(out.read_text()) == MESSAGE


@pytest.mark.parametrize(
    ("command", "seconds", "told"),
    [
        (f"{sys.executable} -c 'raise SystemExit(3)'", actions.SECONDS, "exit code 3"),
        ("no-such-program --now", actions.SECONDS, "not run"),
        (f"{sys.executable} -c 'import time; time.sleep(60)'", 0.1, "not run"),
    ],
    ids=["fails", "missing", "too slow"],
)
def test_a_command_that_fails_is_noted(
    command: str, seconds: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "SECONDS", seconds)
    (line,) = tell(Alarms(command=command), MESSAGE)
    assert line.startswith("alarms.command: ")
    assert told in line
