"""Programs that want out: each attack is made, and what became of it is looked at from outside."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedloom.common.errors import UserError
from fedloom.evaluation.sandbox import execution as code_execution
from fedloom.evaluation.sandbox.bubblewrap import Bubblewrap
from fedloom.evaluation.sandbox.execution import Container, Unsafe, find_sandbox, run_all
from fedloom.evaluation.sandbox.programs import PYTHON, Limits, Program, program_folder

SMALL = Limits(seconds=8.0, memory=256 << 20, processes=32, scratch=32 << 20, output=4096)


def namespaces() -> bool:
    """Whether the system itself makes a sandbox; one of ours that does not work there is a failure and no skip."""
    bare = ["bwrap", "--unshare-all", "--unshare-user", "--ro-bind", "/", "/", "true"]
    return shutil.which("bwrap") is not None and subprocess.run(bare, capture_output=True, check=False).returncode == 0


needs_sandbox = pytest.mark.skipif(not namespaces(), reason="bwrap is not here, or may make no namespaces")


def python(source: str, limits: Limits = SMALL) -> Program:
    return Program({"main.py": source}, [PYTHON, "-B", "/program/main.py"], limits)


# ------------------------------------------------------------------ the sandbox

#: attack → (the program, how it may end: by the sandbox, or by an error of its own)
ATTACKS = {
    "fork bomb": ("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass", {"processes"}),
    "memory bomb": ("held = []\nwhile True:\n    held.append(bytearray(b'1' * (8 << 20)))", {"memory", "error"}),
    "memory of many processes": (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        held = bytearray(b'1' * (100 << 20))\n"
        "        time.sleep(60)\ntime.sleep(60)",
        {"memory"},
    ),
    "files in memory, let go of": (
        "import os\nwhile True:\n    held = os.memfd_create('held')\n    os.write(held, b'1' * (16 << 20))\n    os.close(held)",
        {"error"},
    ),
    "segments in memory, let go of": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nfor _ in range(64):\n"
        "    assert libc.shmget(0, 16 << 20, 0o1600) >= 0, ctypes.get_errno()",
        {"error"},
    ),
    "endless loop": ("while True:\n    pass", {"timeout"}),
    "endless sleep, without output": ("import os, time\nos.close(1)\nos.close(2)\ntime.sleep(600)", {"timeout"}),
    "kill the parent": (
        "import os\nfor pid in (1, os.getppid(), -1):\n    try:\n        os.kill(pid, 9)\n    except OSError:\n        pass\n"
        "os.kill(os.getpid(), 9)",
        {"error"},
    ),
    "fill the disk": (
        "for i in range(10_000):\n    with open(f'/tmp/{i}', 'wb') as file:\n        file.write(b'1' * (4 << 20))", {"error"}
    ),
    "fill /dev/shm": ("open('/dev/shm/a', 'wb').write(b'1')", {"error"}),
    "write beside /tmp": ("open('/a', 'wb').write(b'1')", {"error"}),
    "write the program": ("open('/program/main.py', 'ab').write(b'1')", {"error"}),
    "print gigabytes": ("while True:\n    print('x' * 4000)", {"output"}),
    "a sandbox of its own": ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0", {"error"}),
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_held(attack):
    source, ends = ATTACKS[attack]
    before = time.monotonic()
    ran = Bubblewrap().run(python(source, replace(SMALL, seconds=1.5) if ends == {"timeout"} else SMALL))
    assert time.monotonic() - before < 30.0
    assert not ran.succeeded
    assert ("error" if ran.end == "ended" else ran.end) in ends, ran.output
    assert len(ran.output) <= SMALL.output


@needs_sandbox
def test_memory_that_no_process_holds_cannot_be_made():
    source = (
        "import ctypes, errno, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "made = {'shared memory': lambda: libc.shmget(0, 4096, 0o1600), 'queue': lambda: libc.msgget(0, 0o1600),\n"
        "        'semaphores': lambda: libc.semget(0, 250, 0o1600), 'secret': lambda: libc.syscall(447, 0)}\n"
        "for name, make in made.items():\n"
        "    assert make() == -1 and ctypes.get_errno() == errno.EPERM, name\n"
        "try:\n    os.memfd_create('held')\nexcept PermissionError:\n    print('refused')\n"
    )
    ran = Bubblewrap().run(python(source))
    assert (ran.succeeded, ran.output) == (True, "refused\n")


def test_files_can_be_read_whatever_the_users_umask_says():
    before = os.umask(0o077)
    try:
        with program_folder(Program({"deep/main.py": ""}, ["true"])) as here:
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (here, *here.rglob("*"))}
    finally:
        os.umask(before)
    assert modes == {here.name: 0o755, "deep": 0o755, "main.py": 0o644}


@needs_sandbox
def test_nothing_of_the_user_is_seen(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("a word that nobody may see")
    monkeypatch.setenv("FEDLOOM_SECRET", "another word")
    source = (
        "import os\n"
        f"for path in ({str(secret)!r}, {str(Path.home() / '.bashrc')!r}, '/etc/passwd', '/etc/shadow', '/proc/{os.getpid()}'):\n"
        "    assert not os.path.exists(path), path\n"
        "assert 'FEDLOOM_SECRET' not in os.environ\n"
        "print(sorted(os.environ))\n"
        "pids = [name for name in os.listdir('/proc') if name.isdigit()]\n"
        "assert len(pids) == 2, pids\n"
    )
    ran = Bubblewrap().run(python(source))
    assert ran.succeeded, ran.output


@needs_sandbox
def test_there_is_no_network():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        ran = Bubblewrap().run(python(source))
        assert not ran.succeeded
        assert "refused" in ran.output or "unreachable" in ran.output
        socket.create_connection(("127.0.0.1", port), 2).close()  # from here it can be reached


@needs_sandbox
def test_what_a_program_leaves_running_ends_with_it(tmp_path):
    source = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        open('/tmp/name-of-the-orphan', 'w').close()\n        os.execvp('sleep', ['sleep', '98.7654'])\n"
        "    os._exit(0)\ntime.sleep(0.3)\nprint('gone')"
    )
    ran = Bubblewrap().run(python(source))
    assert (ran.succeeded, ran.output) == (True, "gone\n")
    assert not any("98.7654" in command for command in _commands())


@needs_sandbox
def test_programs_side_by_side_are_told_apart():
    sandbox = Bubblewrap()
    programs = [python(f"print({i})" if i % 3 else "raise SystemExit(3)") for i in range(12)]
    ran = run_all(sandbox, programs, 4)
    assert [r.output for r in ran] == [f"{i}\n" if i % 3 else "" for i in range(12)]
    assert [r.code for r in ran] == [0 if i % 3 else 3 for i in range(12)]


@needs_sandbox
def test_the_last_words_are_kept_to_the_last():
    ran = Bubblewrap().run(python("import os\nos.write(1, b'a' * 4000)\nos.write(1, b'the end')"))
    assert ran.succeeded
    assert ran.output.endswith("the end")


def _commands() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


# ------------------------------------------------------------------ without one


def test_without_a_sandbox_nothing_runs(monkeypatch):
    monkeypatch.setattr(code_execution.shutil, "which", lambda name: None)
    with pytest.raises(
        UserError, match=r"bwrap and prlimit not found; neither docker nor podman found.*--allow-unsafe"
    ):
        find_sandbox()
    assert find_sandbox(allow_unsafe=True).name == "unsafe"


def test_a_sandbox_that_does_not_work_is_not_taken(tmp_path, monkeypatch):
    for name, body in {"bwrap": "echo no namespaces here; exit 1", "prlimit": "exit 0", "docker": "exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match="bwrap cannot make a sandbox here: no namespaces here; docker has no image"):
        find_sandbox()


@pytest.mark.parametrize(
    ("source", "end"),
    [("while True: pass", "timeout"), ("while True: print('x' * 4000)", "output"), ("raise SystemExit(2)", "ended")],
)
def test_unsafe_keeps_time_and_output(source, end):
    ran = Unsafe().run(python(source, replace(SMALL, seconds=1.0)))
    assert ran.end == end
    assert not ran.succeeded
    assert Unsafe().run(python("print('well')")).output == "well\n"


def test_a_container_is_asked_for_with_every_bound(tmp_path, monkeypatch):
    """A stand-in engine that writes down how it was called; no engine was at hand."""
    engine = tmp_path / "docker"
    engine.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/called\n[ "$1" = run ] && exec sleep 60\nexit 0\n')
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    sandbox = Container()
    assert sandbox.trouble() == ""
    ran = sandbox.run(python("print(1)", replace(SMALL, seconds=0.5)))
    assert ran.end == "timeout"
    called = (tmp_path / "called").read_text().split("\n")
    wanted = {
        "--network": "none", "--cap-drop": "ALL", "--security-opt": "no-new-privileges", "--user": "65534:65534",
        "--memory": str(SMALL.memory), "--memory-swap": str(SMALL.memory), "--pids-limit": "32",
        "--tmpfs": f"/tmp:rw,exec,size={SMALL.scratch}",
    }  # fmt: skip
    assert {key: called[called.index(key) + 1] for key in wanted} == wanted
    assert "--read-only" in called
    assert called[called.index("--entrypoint") + 1] == "python3"  # the image's own, wherever this machine has one
    assert called[called.index("kill") + 1] == called[called.index("--name") + 1]
