"""Generated code: refused without a sandbox; in one, it reaches nothing and cannot claim a pass.

What a program may do is checked from both sides: by the program (its own assertions) and by this
process (files that are not there, a listener nobody called, processes that are gone).
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import RequestError
from holdfast.meters import sandbox
from holdfast.meters.importing import Frozen
from holdfast.meters.probes import Item, presets, read
from holdfast.meters.sandbox import Job, Outcome, run_all, run_code

HUMAN_EVAL = Path(__file__).parents[3] / "shared" / "data" / "benchmarks" / "humaneval.jsonl"


def _why_no_sandbox() -> str:
    """Asked of bwrap directly, so that a fault of ours fails the tests and does not skip them."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "bubblewrap is not installed"
    plain = [bwrap, "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "true"]
    tried = subprocess.run(plain, capture_output=True, text=True, check=False)
    return f"bwrap cannot make a sandbox here: {tried.stderr}" if tried.returncode else ""


needs_sandbox = pytest.mark.skipif(bool(_why_no_sandbox()), reason=_why_no_sandbox())


def run(program: str, tests: str = "", seconds: float = 20.0, **limits: int) -> Outcome:
    return run_code(program, tests, allowed=True, seconds=seconds, **limits)


# --- refused ---------------------------------------------------------------------------------


def _stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A `bwrap` of our own, alone on the PATH."""
    (folder / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(tmp_path, monkeypatch, f"echo > {tmp_path}/started")
    with pytest.raises(RequestError, match="--run-generated-code"):
        run_code("1")
    with pytest.raises(RequestError, match="run_generated_code: true"):
        run_all([Job("1")])
    assert not (tmp_path / "started").exists()


def test_without_bwrap_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    trace = tmp_path / "ran"
    for call in (run_code, lambda p, **k: run_all([Job(p)], **k)):
        with pytest.raises(RequestError, match="install bubblewrap") as refused:
            call(f"open({str(trace)!r}, 'w')", allowed=True)
        assert "\n" not in str(refused.value)
        assert refused.value.exit_code == 2
    assert not trace.exists()


def test_where_bwrap_is_forbidden_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words of bubblewrap's source (`die_with_error`) where namespaces are forbidden."""
    words = "bwrap: Creating new namespace failed: Operation not permitted"
    _stand_in(tmp_path, monkeypatch, f"echo '{words}' >&2; exit 1")
    trace = tmp_path / "ran"
    with pytest.raises(RequestError, match=words) as refused:
        run(f"open({str(trace)!r}, 'w')")
    assert "\n" not in str(refused.value)
    assert not trace.exists()


def test_a_bwrap_that_does_nothing_passes_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stand_in(tmp_path, monkeypatch, "exit 0")
    with pytest.raises(RequestError, match="could not make one: 'exit code 0'"):
        run("1")
    _stand_in(tmp_path, monkeypatch, "printf ready >&0; exit 0")
    assert run("1") == Outcome(False, "ended with exit code 0 before its tests did", "")
    _stand_in(tmp_path, monkeypatch, "exec /bin/sleep 60")
    with pytest.raises(RequestError, match=r"did not start within 0\.2 s"):
        run("1", seconds=0.2)


def test_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(RequestError, match="x86_64 and aarch64"):
        run("1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seconds", 0),
        ("seconds", float("nan")),
        ("seconds", float("inf")),
        ("memory_mb", 63),
        ("processes", 0),
        ("file_mb", 0),
    ],
)
def test_limits_that_cannot_be(name: str, value: float) -> None:
    with pytest.raises(RequestError, match=f"^{name}: {value} .* such as [0-9]+$"):
        run_code("1", allowed=True, **{name: value})


# --- words and filter, without a sandbox -----------------------------------------------------


@given(st.text())
def test_a_reason_is_one_short_printable_line(output: str) -> None:
    line = sandbox._last_line(output)
    assert len(line) <= 200
    assert line.isprintable()


def _verdict(program: bytes, audit: int, number: int, argument: int = 0) -> int:
    """Run a seccomp filter on one call: classic BPF as in the kernel's `networking/filter.rst`."""
    data = struct.pack("<IIQ6Q", number, audit, 0, argument, 0, 0, 0, 0, 0)
    lines, at, a = list(struct.iter_unpack("<HBBI", program)), 0, 0
    while True:
        code, true, false, k = lines[at]
        if code == 0x06:
            return int(k)
        if code == 0x20:
            (a,) = struct.unpack_from("<I", data, k)
            at += 1
        else:
            holds = {0x15: a == k, 0x35: a >= k, 0x45: bool(a & k)}[code]
            at += 1 + (true if holds else false)


@pytest.mark.parametrize(
    ("machine", "audit", "header"),
    [
        ("x86_64", 0xC000003E, "x86_64-linux-gnu/asm/unistd_64.h"),
        ("aarch64", 0xC00000B7, "asm-generic/unistd.h"),
    ],
)
def test_filter(machine: str, audit: int, header: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of the machine, against the numbers in the kernel's own header."""
    file = Path("/usr/include") / header
    if not file.is_file():
        pytest.skip(f"the kernel's header {header} is not installed")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", file.read_text())
    names = {int(number): name for name, number in found}
    forbidden = {"memfd_create", "memfd_secret", "shmget", "semget", "msgget", "ptrace", "unshare"}
    forbidden |= {"io_uring_setup", "userfaultfd", "bpf", "perf_event_open"}
    forbidden |= {"add_key", "request_key", "keyctl"}
    assert forbidden < set(names.values())
    monkeypatch.setattr(platform, "machine", lambda: machine)
    program = sandbox._seccomp_filter()
    allow, no, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    for number, name in names.items():
        expected = no if name in forbidden else absent if name == "clone3" else allow
        argument = socket.AF_UNIX if name == "socket" else 0
        assert _verdict(program, audit, number, argument) == expected, name
    (clone,) = (number for number, name in names.items() if name == "clone")
    (sockets,) = (number for number, name in names.items() if name == "socket")
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x10000000, 0x20000000, 0x40000000):
        assert _verdict(program, audit, clone, flag | 17) == no  # CLONE_NEW*, with SIGCHLD
    assert _verdict(program, audit, clone, 0x003D0F00) == allow  # a thread, as glibc starts it
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_VSOCK):
        assert _verdict(program, audit, sockets, family) == no
    assert _verdict(program, 0x40000003, 1) == kill  # i386, whose numbers are others
    assert _verdict(program, audit, 0x40000000 | 39) == no  # x32


# --- passes and failures ---------------------------------------------------------------------


def human_eval(prompt: str, completion: str, test: str, entry_point: str) -> Job:
    """What is run of a row of HumanEval, as it is imported, and an answer to it."""
    row = {"task_id": "1", "prompt": prompt, "test": test, "entry_point": entry_point}
    (record,) = presets._humaneval([row], "humaneval", Frozen(count=1))
    return read._job(Item.model_validate(record), completion)


@needs_sandbox
def test_tests_decide() -> None:
    """An item as HumanEval writes them; the wrong completion errs at 0 alone."""
    prompt = 'def sign(x):\n    """-1, 0 or 1."""\n'
    test = (
        "def check(candidate):\n"
        "    assert candidate(5) == 1\n"
        "    assert candidate(-5) == -1\n"
        "    assert candidate(0) == 0, 'zero'\n"
    )
    right = human_eval(prompt, "    return (x > 0) - (x < 0)\n", test, "sign")
    wrong = human_eval(prompt, "    return 1 if x > 0 else -1\n", test, "sign")
    broken = human_eval(prompt, "    return (\n", test, "sign")
    outcomes = run_all([right, wrong, broken, right], allowed=True, seconds=30)
    assert [outcome.passed for outcome in outcomes] == [True, False, False, True]
    assert outcomes[0] == Outcome(True, "passed", "")
    assert outcomes[1].reason == "AssertionError: zero"
    assert outcomes[2].reason.startswith("SyntaxError")


@needs_sandbox
@pytest.mark.skipif(not HUMAN_EVAL.is_file(), reason="HumanEval is not at hand")
def test_human_eval_accepts_its_own_solutions() -> None:
    """Its first items: the solution passes, the solution followed by `return None` first fails."""
    rows = [json.loads(line) for line in HUMAN_EVAL.read_text().splitlines()[:6]]
    jobs = [
        human_eval(row["prompt"], body + row["canonical_solution"], row["test"], row["entry_point"])
        for body in ("", "    return None\n")
        for row in rows
    ]
    outcomes = run_all(jobs, allowed=True, seconds=30)
    assert [outcome.passed for outcome in outcomes] == [True] * 6 + [False] * 6


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import os, sys; os.execv(sys.executable, [sys.executable, '-c', ''])",
        "import os\nif os.fork(): os._exit(0)",
        "import sys; sys.excepthook = lambda *_: print('passed')",
        "import builtins; builtins.AssertionError = builtins.ZeroDivisionError",
        "import builtins; builtins.len = lambda _: 3; builtins.exec = builtins.compile = print",
        "import builtins; builtins.__dict__.clear()",
        "__builtins__ = {'len': lambda _: 3}",
        "import builtins; builtins.__build_class__ = builtins.__import__ = lambda *_, **__: 3",
        "import os; os.write = lambda *_: 0; os.read = lambda *_: b''; os._exit = print",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'ready' + b'0' * 32)\n"
        "    except OSError: pass",
        "import sys; sys.settrace(lambda *_: None); sys.stdout = sys.stderr = None",
        "import threading; threading.Thread(target=lambda: print('passed')).start()",
        "import atexit, os; atexit.register(os._exit, 0)",
        "import signal, os; signal.alarm(1); signal.signal(14, lambda *_: os._exit(0))",
    ],
)
def test_no_pass_without_the_tests(program: str) -> None:
    assert not run(program, "assert len([1, 2]) == 3").passed


@needs_sandbox
def test_tests_that_hold_pass_even_so() -> None:
    """The counterpart of the tricks above: with the builtins put back, true tests pass."""
    program = (
        "import builtins, os\n"
        "builtins.len = lambda _: 3\n"
        "builtins.extra = 1\n"
        "os.write = os.read = os._exit = None\n"
        "__builtins__ = {}\n"
    )
    tests = (
        "assert len([1, 2]) == 2\n"
        "try: extra\n"
        "except NameError: pass\n"
        "else: raise ValueError\n"
        "import dataclasses, enum, typing, threading\n"
        "@dataclasses.dataclass\n"
        "class Point: x: 'int'\n"
        "assert typing.get_type_hints(Point) == {'x': int}\n"
    )
    assert run(program, tests) == Outcome(True, "passed", "")


# --- escapes ---------------------------------------------------------------------------------


def _unreachable(paths: list[str]) -> str:
    return (
        "import os\n"
        f"for path in {paths!r}:\n"
        "    for open_it in (open, os.listdir, os.readlink, os.stat):\n"
        "        try: open_it(path)\n"
        "        except OSError: pass\n"
        "        else: raise ValueError(path)\n"
    )


@needs_sandbox
def test_nothing_of_the_user_is_in_sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "secret").write_text("hunter2")
    paths = ["/etc/passwd", "/etc/shadow", "/etc", "/home", "/bin/sh", "/usr/bin", "/sys"]
    paths += [str(Path.home()), __file__, str(Path(__file__).parents[2]), sandbox.__file__]
    paths += [str(tmp_path / "secret"), "../../../../etc/passwd"]
    paths += [str(Path("/proc", process, "root", "etc", "passwd")) for process in ("1", "self")]
    program = _unreachable(paths) + (
        "assert 'hunter2' not in repr(os.environ)\n"
        "pids = [name for name in os.listdir('/proc') if name.isdigit()]\n"
        "assert len(pids) <= 2, pids\n"
        "assert all(b'hunter2' not in open(f'/proc/{p}/cmdline', 'rb').read() for p in pids)\n"
        "assert 0 not in os.getresuid() + os.getresgid() and not os.getgroups() or os.getuid()\n"
        "assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read()\n"
    )
    assert run(program, "assert os.listdir('/tmp') == []").reason == "passed"


@needs_sandbox
def test_nothing_outside_tmp_can_be_written(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("kept")
    program = (
        "import os\n"
        f"places = [{str(tmp_path)!r}, {os.getcwd()!r}, '/', '/dev', '/dev/shm', '/proc', '/root', "
        "'/python', '/python/lib', '/usr/lib', '/lib', '/var/tmp']\n"
        "for place in places:\n"
        "    for name in ('mine', 'new'):\n"
        "        try: open(f'{place}/{name}', 'w').write('x')\n"
        "        except OSError: pass\n"
        "        else: raise ValueError(place)\n"
        "for name in ('/job', os.__file__, '/proc/1/mem', '/proc/sys/kernel/hostname'):\n"
        "    try: open(name, 'r+b')\n"
        "    except OSError: pass\n"
        "    else: raise ValueError(name)\n"
        "open('/tmp/allowed', 'w').write('x')\n"
        "mounts = [line.split() for line in open('/proc/mounts')]\n"
        "writable = {at for _, at, _, how, *_ in mounts if 'rw' in how.split(',')}\n"
        "assert all(at.startswith('/dev/') for at in writable - {'/tmp'}), writable\n"
    )
    assert run(program).reason == "passed"
    assert mine.read_text() == "kept"
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    assert not Path("/tmp/allowed").exists()


@needs_sandbox
def test_no_network(tmp_path: Path) -> None:
    """Two listeners of ours, on a port and on an abstract name, which no mount hides."""
    name = f"\0holdfast-{uuid.uuid4()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as port,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind(name)
        abstract.listen()
        port.setblocking(False)
        abstract.setblocking(False)
        program = (
            "import socket\n"
            f"calls = [(socket.AF_INET, {port.getsockname()!r}), (socket.AF_UNIX, {name!r}),\n"
            "    (socket.AF_INET6, ('::1', 80)), (socket.AF_VSOCK, (2, 80))]\n"
            "for family, address in calls:\n"
            "    try: socket.socket(family, socket.SOCK_STREAM).connect(address)\n"
            "    except OSError: pass\n"
            "    else: raise ValueError(address)\n"
            "seen = open('/proc/net/dev').read().splitlines()[2:]\n"
            "assert [line.split(':')[0].strip() for line in seen] == ['lo'], seen\n"
        )
        assert run(program).reason == "passed"
        for listener in (port, abstract):
            with pytest.raises(BlockingIOError):
                listener.accept()


@needs_sandbox
def test_forbidden_calls() -> None:
    """By number, past libc: memory no limit counts, new namespaces, other doors."""
    numbers = sandbox._SYSTEMS[platform.machine()].forbidden
    program = (
        "import _ctypes, ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"for name, number in {numbers!r}.items():\n"
        "    assert libc.syscall(number, 0, 0, 0, 0, 0) == -1, name\n"
        "    assert ctypes.get_errno() == 1, (name, ctypes.get_errno())\n"
        "assert libc.unshare(0x10000000) == -1\n"
        "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0) == -1\n"
    )
    assert run(program).reason == "passed"
    assert ctypes.CDLL(None).getpid() == os.getpid()  # the same door is open out here


def _gone(name: str) -> bool:
    """Whether no process of that name is left; waits for the kernel to clear them away."""
    for _ in range(100):
        if name not in {process.name() for process in psutil.process_iter(["name"])}:
            return True
        time.sleep(0.1)
    return False


def _named() -> tuple[str, str]:
    """A name, and the lines by which a program takes it (its children inherit it)."""
    name = uuid.uuid4().hex[:15]
    return name, f"import ctypes; ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"


@needs_sandbox
def test_fork_bomb() -> None:
    name, take_name = _named()
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    outcome = run(take_name + bomb, seconds=2, processes=8)
    assert outcome == Outcome(False, "stopped after 2 s", "")
    assert _gone(name)


@needs_sandbox
@pytest.mark.parametrize("processes", [1, 5])
def test_processes_are_counted_exactly(processes: int) -> None:
    """Two at once: one sandbox's processes are not another's."""
    program = (
        "import os, time\nn = 1\n"
        "try:\n"
        "    while n < 50:\n"
        "        if not os.fork(): time.sleep(60)\n"
        "        n += 1\n"
        "except BlockingIOError: pass\n"
        "time.sleep(0.5)\n"
    )
    jobs = [Job(program, f"assert n == {processes}, n")] * 2
    outcomes = run_all(jobs, allowed=True, seconds=30, processes=processes)
    assert [outcome.reason for outcome in outcomes] == ["passed", "passed"]


@needs_sandbox
def test_memory_bomb() -> None:
    assert run("x = bytearray(300 << 20)", memory_mb=200).reason == "MemoryError"
    assert run("x = bytearray(100 << 20)", memory_mb=200).passed
    grow = "x = []\nwhile True: x.append(bytes(range(256)) * 4096)"
    assert run(grow, memory_mb=200).reason == "MemoryError"


@needs_sandbox
def test_full_disk() -> None:
    """One file above the limit (EFBIG), and files that are too much together (ENOSPC)."""
    program = (
        "import errno\n"
        "def fill(name, mb):\n"
        "    try:\n"
        "        with open(f'/tmp/{name}', 'wb', buffering=0) as file:\n"
        "            for _ in range(mb):\n"
        "                if file.write(bytes(1 << 20)) < 1 << 20: file.write(b'x')\n"
        "    except OSError as error: return error.errno\n"
        "assert fill('one', 3) is None\n"
        "assert fill('two', 3) == errno.ENOSPC\n"
        "import os; os.remove('/tmp/one'); os.remove('/tmp/two')\n"
        "os.truncate(os.open('/tmp/sparse', os.O_CREAT | os.O_RDWR), 4 << 20)\n"
        "try: os.truncate('/tmp/sparse', (4 << 20) + 1)\n"
        "except OSError as error: assert error.errno == errno.EFBIG\n"
        "else: raise ValueError\n"
    )
    assert run(program, file_mb=4).reason == "passed"


@needs_sandbox
def test_endless_printing() -> None:
    outcome = run("while True: print('x' * 100_000)", file_mb=2)
    assert outcome[:2] == (False, "printed more than 2 MB")
    assert 0 < len(outcome.output) <= sandbox.OUTPUT_BYTES


@needs_sandbox
def test_endless_loops() -> None:
    """Sleeping is stopped by the wall clock, whatever it does with signals."""
    name, take_name = _named()
    deaf = "import signal, time\nfor n in (1, 2, 14, 15, 24): signal.signal(n, signal.SIG_IGN)\n"
    assert run("while True: pass", seconds=1.5).reason == "stopped after 1.5 s"
    outcome = run(take_name + deaf + "while True: time.sleep(60)", seconds=1)
    assert outcome.reason == "stopped after 1 s"
    assert _gone(name)


@needs_sandbox
def test_nobody_outside_can_be_killed() -> None:
    """Neither this process nor bwrap's own, which the program sees as its parent."""
    program = (
        "import os, signal\n"
        f"for pid in (1, os.getppid(), {os.getpid()}, {os.getppid()}, -1):\n"
        "    try: os.kill(pid, signal.SIGKILL)\n"
        "    except OSError: pass\n"
    )
    assert run(program).passed
    assert run("1").passed


@needs_sandbox
def test_a_sandbox_dies_with_holdfast() -> None:
    name, take_name = _named()
    program = take_name + "import time; time.sleep(300)"
    call = (
        f"from holdfast.meters.sandbox import *; run_code({program!r}, allowed=True, seconds=300)"
    )
    holdfast = subprocess.Popen([sys.executable, "-c", call])
    try:
        while name not in {process.name() for process in psutil.process_iter(["name"])}:
            assert holdfast.poll() is None
            time.sleep(0.1)
    finally:
        holdfast.kill()
        holdfast.wait()
    assert _gone(name)
