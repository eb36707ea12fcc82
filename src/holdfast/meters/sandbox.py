"""Running code that a model wrote: only when asked for, and only inside bubblewrap.

What the program gets: the interpreter with its standard library (read-only), an empty `/tmp` of
limited size, `/proc` and `/dev` of its own. What it does not: a network, a home, `/etc`, a shell,
other processes, the environment, root, new namespaces. Every limit is kept by the kernel:

    bwrap     namespaces (pid, net, ipc, uts, cgroup, user), mounts, death with its parent
    seccomp   system calls by which memory, processes or sockets would slip past the rest
    rlimits   processor time, address space, processes, file size, open files; set by `_inside`
    killpg    wall time

A program passes only if a token comes back that nothing in its process has read before its tests
ended: leaving early with exit code 0 is no pass. docs/sandbox.md says what this cannot stop.
"""

from __future__ import annotations

import errno
import inspect
import json
import math
import os
import platform
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from holdfast.errors import RequestError

OUTPUT_BYTES = 20_000
"""How much of what a program printed is kept: its end, where the traceback is."""
OPEN_FILES = 64
LEAST_MEMORY_MB = 64
"""Below this the interpreter itself does not start."""
READY = b"ready"
_PYTHON = f"/python/bin/python3.{sys.version_info.minor}"


class Job(NamedTuple):
    """A program, and the tests that run after it in its namespace."""

    program: str
    tests: str = ""


class Outcome(NamedTuple):
    """Whether the tests ended, why not, and the end of what was printed."""

    passed: bool
    reason: str
    output: str = ""


def run_all(
    jobs: Sequence[Job],
    *,
    allowed: bool = False,
    seconds: float = 10.0,
    memory_mb: int = 512,
    processes: int = 4,
    file_mb: int = 16,
) -> list[Outcome]:
    """`run_code` on each job, as many at once as there are cores; outcomes in their order."""
    run = partial(
        run_code,
        allowed=allowed,
        seconds=seconds,
        memory_mb=memory_mb,
        processes=processes,
        file_mb=file_mb,
    )
    _check(allowed, seconds, memory_mb, processes, file_mb)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: run(job.program, job.tests), jobs))


def run_code(
    program: str,
    tests: str = "",
    *,
    allowed: bool = False,
    seconds: float = 10.0,
    memory_mb: int = 512,
    processes: int = 4,
    file_mb: int = 16,
) -> Outcome:
    """Run `program`, then `tests` in its namespace with the builtins put back.

    Args:
        allowed: the user asked for it (`run_generated_code`).
        seconds: wall time, the interpreter's start included; processor time too, rounded up.
        memory_mb: address space of each process.
        processes: how many at once, threads counted; so at most `processes * memory_mb` in all.
        file_mb: size of any one file, of `/tmp` in all, and of what is printed.

    Raises RequestError where it was not asked for, or no sandbox can be had here.
    """
    bwrap = _check(allowed, seconds, memory_mb, processes, file_mb)
    as_root = os.geteuid() == 0
    job = {
        "program": program,
        "tests": tests,
        # The kernel does not count root's processes, and counts those of any other user over all
        # sandboxes; so each gets a user of its own. Others get that from their user namespace,
        # where bwrap's own process counts as well.
        "uid": 1_900_000_000 + secrets.randbelow(100_000_000) if as_root else None,
        "limits": {
            "RLIMIT_CPU": math.ceil(seconds),
            "RLIMIT_AS": memory_mb << 20,
            "RLIMIT_FSIZE": file_mb << 20,
            "RLIMIT_NOFILE": OPEN_FILES,
            "RLIMIT_CORE": 0,
            "RLIMIT_NPROC": processes + (not as_root),
        },
    }
    token = secrets.token_hex(16).encode()
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        tempfile.TemporaryFile() as text,
        tempfile.TemporaryFile() as seccomp,
        tempfile.TemporaryFile() as printed,
    ):
        text.write(json.dumps(job).encode())
        seccomp.write(_seccomp_filter())
        for file in (text, seccomp):
            file.seek(0)
        ours.sendall(token)
        ours.shutdown(socket.SHUT_WR)
        command = [bwrap, *_namespaces(as_root), *_mounts(text.fileno(), file_mb << 20)]
        command += ["--seccomp", str(seccomp.fileno()), "--", _PYTHON, "-I", "-S", "-u"]
        command += ["-X", "utf8", "-c", f"{inspect.getsource(_inside)}\n_inside()\n"]
        process = subprocess.Popen(
            command,
            stdin=theirs.fileno(),
            stdout=printed,
            stderr=subprocess.STDOUT,
            pass_fds=(text.fileno(), seccomp.fileno()),
            env={},
            start_new_session=True,
        )
        theirs.close()
        code: int | None = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said = _received(ours, len(READY) + len(token) + 1)
        full = printed.seek(0, os.SEEK_END) >= file_mb << 20
        printed.seek(max(0, printed.tell() - OUTPUT_BYTES))
        output = printed.read(OUTPUT_BYTES).decode("utf-8", "replace")
    if not said.startswith(READY):
        raise RequestError(_not_started(code, seconds, output))
    if code == 0 and said == READY + token:
        return Outcome(True, "passed", output)
    if full:
        return Outcome(False, f"printed more than {file_mb} MB", output)
    return Outcome(False, _reason(code, seconds, output), output)


def _inside() -> None:
    """What runs in the sandbox; its source is handed to the interpreter there.

    Nothing of holdfast's is in reach, and nothing is looked up among the builtins once the program
    ran: it may have changed them.
    """
    import builtins
    import json
    import os
    import resource
    import sys
    import types

    with open("/job", encoding="utf-8") as file:
        job = json.load(file)
    channel = os.dup(0)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    for name, value in job["limits"].items():
        limit = getattr(resource, name)
        hard = resource.getrlimit(limit)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (least, least))
    os.listdir(os.path.dirname(os.__file__))  # no library, no sandbox
    run, read, write, leave = exec, os.read, os.write, os._exit
    write(channel, b"ready")
    program = compile(job["program"], "program", "exec")
    tests = compile(job["tests"], "tests", "exec")
    module = sys.modules["program"] = types.ModuleType("program")
    namespace, present = vars(module), vars(builtins)
    kept = present.copy()
    run(program, namespace)
    present.clear()
    present.update(kept)
    namespace["__builtins__"] = builtins
    run(tests, namespace)
    write(channel, read(channel, 64))
    leave(0)


def _check(allowed: bool, seconds: float, memory_mb: int, processes: int, file_mb: int) -> str:
    """Where bwrap is. Raises RequestError where generated code cannot be run, or must not be."""
    if not allowed:
        raise RequestError(
            "generated code is run only when asked for; set run_generated_code: true or give "
            "--run-generated-code, or leave out the items of kind code"
        )
    problems = [
        f"{name}: {value} is below the least, {least}; give a value such as {example}"
        for name, value, least, example in (
            ("memory_mb", memory_mb, LEAST_MEMORY_MB, 512),
            ("processes", processes, 1, 4),
            ("file_mb", file_mb, 1, 16),
        )
        if value < least
    ]
    if not 0 < seconds < math.inf:
        problems.append(f"seconds: {seconds} is not a time above 0; give a value such as 10")
    if problems:
        raise RequestError(*problems)
    bwrap = shutil.which("bwrap")
    if sys.platform != "linux" or platform.machine() not in _SYSTEMS:
        raise RequestError(
            f"generated code cannot be run on {platform.system()} {platform.machine()}: the "
            f"sandbox is made for Linux on {' and '.join(_SYSTEMS)}; leave out the items of kind "
            "code, or run them on such a machine"
        )
    if bwrap is None:
        raise RequestError(
            "generated code is run only in a sandbox, and bubblewrap's 'bwrap' is not on the PATH; "
            "install it ('apt install bubblewrap' or 'dnf install bubblewrap', 0.7 or newer), or "
            "leave out the items of kind code"
        )
    return bwrap


def _not_started(code: int | None, seconds: float, output: str) -> str:
    if code is None:
        return f"the sandbox did not start within {seconds:g} s; give more seconds, such as 10"
    return (
        f"generated code is run only in a sandbox, and bwrap could not make one: "
        f"'{_last_line(output) or f'exit code {code}'}'; it needs bubblewrap 0.7 or newer and a "
        "kernel that lets this user make user namespaces (in a container they are often "
        "forbidden: run outside it), or leave out the items of kind code"
    )


def _reason(code: int | None, seconds: float, output: str) -> str:
    """Why it did not pass; bwrap turns death by signal n into exit code 128 + n."""
    if code is None:
        return f"stopped after {seconds:g} s"
    if code == 128 + signal.SIGXCPU or code == 128 + signal.SIGKILL:
        return f"killed by {signal.Signals(code - 128).name}: out of time or memory"
    if 128 < code < 128 + signal.NSIG:
        return f"killed by signal {code - 128}"
    if code == 0:
        return "ended with exit code 0 before its tests did"
    return _last_line(output) or f"ended with exit code {code}"


def _last_line(output: str) -> str:
    """The last line, fit to be shown: printable and short."""
    lines = output.split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return "".join(c if c.isprintable() else " " for c in last.strip()[:200])


def _received(channel: socket.socket, most: int) -> bytes:
    """What came until the other end closed; bounded, for the program may write here too."""
    channel.settimeout(5.0)
    said = b""
    try:
        while len(said) < most and (more := channel.recv(most - len(said))):
            said += more
    except OSError:
        pass
    return said


def _namespaces(as_root: bool) -> Iterator[str]:
    yield from ("--die-with-parent", "--new-session", "--hostname", "sandbox")
    yield from ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts")
    yield "--unshare-cgroup-try"
    if not as_root:
        yield "--unshare-user"


def _mounts(job: int, size: int) -> Iterator[str]:
    """The file system: libraries and interpreter read-only, `/tmp` of `size` bytes, the rest
    read-only and empty. `job` is the descriptor of the file that becomes `/job`.
    """
    for name in ("/usr", "/python", "/python/bin"):
        yield from ("--perms", "0755", "--dir", name)
    for name in ("/lib", "/lib64", "/usr/lib", "/usr/lib64"):
        if os.path.islink(name):
            yield from ("--symlink", os.readlink(name), name)
        elif os.path.isdir(name):
            yield from ("--ro-bind", name, name)
    # The interpreter finds its library beside itself; so a home that holds it is not in sight.
    yield from ("--ro-bind", os.path.realpath(sys.executable), _PYTHON)
    for name in ("lib", "lib64"):
        if os.path.isdir(folder := os.path.join(sys.base_prefix, name)):
            yield from ("--ro-bind", folder, f"/python/{name}")
    yield from ("--setenv", "LD_LIBRARY_PATH", "/python/lib", "--setenv", "HOME", "/tmp")
    yield from ("--proc", "/proc", "--remount-ro", "/proc")
    yield from ("--dev", "/dev", "--remount-ro", "/dev")
    yield from ("--perms", "1777", "--size", str(size), "--tmpfs", "/tmp", "--chdir", "/tmp")
    yield from ("--perms", "0444", "--ro-bind-data", str(job), "/job", "--remount-ro", "/")


class _System(NamedTuple):
    """Numbers of one machine's system calls (`asm/unistd.h`) and its `AUDIT_ARCH`."""

    audit: int
    clone: int
    socket: int
    forbidden: dict[str, int]


_EVERYWHERE = {"io_uring_setup": 425, "memfd_secret": 447}
_CLONE3 = 435
_SYSTEMS = {
    "x86_64": _System(
        0xC000003E,
        clone=56,
        socket=41,
        forbidden=_EVERYWHERE
        | {"shmget": 29, "semget": 64, "msgget": 68, "ptrace": 101, "add_key": 248}
        | {"request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298}
        | {"memfd_create": 319, "bpf": 321, "userfaultfd": 323},
    ),
    "aarch64": _System(
        0xC00000B7,
        clone=220,
        socket=198,
        forbidden=_EVERYWHERE
        | {"shmget": 194, "semget": 190, "msgget": 186, "ptrace": 117, "add_key": 217}
        | {"request_key": 218, "keyctl": 219, "unshare": 97, "perf_event_open": 241}
        | {"memfd_create": 279, "bpf": 280, "userfaultfd": 282},
    ),
}
"""Memory that no limit counts (memfd, System V, keys), new namespaces (a file system of one's own
has no size limit), and doors into the kernel that no such program needs."""


def _seccomp_filter() -> bytes:
    """The filter as the kernel reads it: `struct sock_filter` {code, jump true, jump false, k}.

    Of sockets only AF_UNIX is left: some kinds (AF_VSOCK) are not bound to the network namespace.
    """
    system = _SYSTEMS[platform.machine()]
    load, equal, at_least, any_bit, give_back = 0x20, 0x15, 0x35, 0x45, 0x06
    number_at, audit_at, argument_at = 0, 4, 16
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    new_namespaces, x32 = 0x7E020000, 0x40000000
    no = (give_back, 0, 0, refuse | errno.EPERM)
    program = [(load, 0, 0, audit_at), (equal, 1, 0, system.audit), (give_back, 0, 0, kill)]
    program += [(load, 0, 0, number_at), (at_least, 0, 1, x32), no]
    for number in system.forbidden.values():
        program += [(equal, 0, 1, number), no]
    # Its flags lie in memory, where no filter sees them; libc falls back on clone.
    program += [(equal, 0, 1, _CLONE3), (give_back, 0, 0, refuse | errno.ENOSYS)]
    program += [(equal, 0, 4, system.clone), (load, 0, 0, argument_at)]
    program += [(any_bit, 0, 1, new_namespaces), no, (give_back, 0, 0, allow)]
    program += [(equal, 0, 4, system.socket), (load, 0, 0, argument_at)]
    program += [(equal, 1, 0, socket.AF_UNIX), no, (give_back, 0, 0, allow)]
    program += [(give_back, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *line) for line in program)
