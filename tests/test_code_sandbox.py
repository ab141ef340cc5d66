"""Hostile programs, each bounded in itself (200 children, 2 GB, 20 s), are stopped; the runner lives.

All of them once more as a user without rights, by the system's own Python.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from kdlib.code import sandbox
from kdlib.code.sandbox import Limits, run
from kdlib.errors import RunError

ROOT = Path(__file__).parent.parent
FORKS = """
import os, time
for _ in range(200):
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
"""
THREADS = """
import threading, time
for _ in range(200):
    threading.Thread(target=time.sleep, args=(20,)).start()
"""
MEMORY = "held = []\nfor _ in range(20):\n    held.append(bytearray(100 * 2**20))"
LOOP = "import time\nend = time.time() + 20\nwhile time.time() < end:\n    pass"
DEAF = f"import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n{LOOP}"
SLEEP = "import time\ntime.sleep(20)"
PRINT = "import time\nend = time.time() + 20\nwhile time.time() < end:\n    print('x' * 10_000)"
KILL = """
import os, signal
for process in ({runner}, os.getppid(), 1):
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(process, number)
        except OSError as error:
            print(process, error)
os.kill(-1, signal.SIGKILL)
"""
KILL_GROUP = "import os, signal\nos.kill(0, signal.SIGKILL)"
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(20)
    os._exit(0)
"""
ONE_FILE = "file = open('a', 'wb')\nfor _ in range(20):\n    file.write(bytes(100 * 2**20)); file.flush()"
MANY_FILES = """
for number in range(200):
    with open(f"{number}", "wb") as file:
        file.write(bytes(10 * 2**20))
"""
EMPTY_FILES = "for number in range(20_000):\n    open(f'{number}', 'x').close()"
READ = """
import os
print(dict(os.environ))
for path in ("/proc/self/environ", "/proc/1/environ", {secret!r}, "/etc/passwd", "/etc/shadow"):
    try:
        print(open(path).read())
    except OSError as error:
        print(type(error).__name__)
print(os.listdir("/"), os.path.expanduser("~"), os.listdir(os.path.expanduser("~")))
"""
WRITE = """
import os, sys
own = sys.base_prefix, os.path.dirname(os.__file__)
for path in (*{outside}, *own, "/", "/usr", "/dev", "/dev/shm", "/etc"):
    try:
        open(f"{{path}}/planted_by_a_test", "w").write("x")
        print("wrote", path)
    except OSError as error:
        print(type(error).__name__)
try:
    os.rename("/usr", "/elsewhere")
    print("wrote /usr")
except OSError:
    pass
"""
CONNECT = "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)"
SOCKETS = """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_VSOCK):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            socket.socket(family, kind)
            print("made", family)
        except PermissionError:
            pass
"""
RIGHTS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
tried = dict(
    unshare=libc.unshare(0x10000000), mount=libc.mount(b"x", b"/tmp", b"tmpfs", 0, None),
    chroot=libc.chroot(b"/tmp"), umount=libc.umount2(b"/tmp", 2), setuid=libc.setuid(0),
    memory_file=libc.memfd_create(b"x", 0), shared=libc.shmget(0, 4096, 0o1600), queue=libc.msgget(0, 0o1600),
    trace=libc.ptrace(16, 1, 0, 0), clone=libc.syscall(56, 0x10000011, 0, 0, 0, 0),
    clone3=libc.syscall(435, 0, 0), keys=libc.syscall(250, 0, -3, 1), ring=libc.syscall(425, 1, 0),
)
print([name for name, result in tried.items() if result != -1], os.getuid())
"""
SHORT = Limits(cpu_s=1, wall_s=15)
HOSTILE = {  # program, and the kinds of verdict that are right
    "forks": (FORKS, {"refused"}),
    "threads": (THREADS, {"exception"}),
    "memory": (MEMORY, {"memory"}),
    "loop": (LOOP, {"time-out"}),
    "deaf": (DEAF, {"time-out"}),
    "print": (PRINT, {"time-out"}),
    "kill": (KILL.format(runner=1), {"exception"}),  # nobody else is there
    "kill_group": (KILL_GROUP, {"exception"}),
    "daemon": (DAEMON, {"passed"}),
    "one_file": (ONE_FILE, {"refused"}),
    "many_files": (MANY_FILES, {"refused"}),
    "empty_files": (EMPTY_FILES, {"refused"}),
    "sockets": (SOCKETS, {"passed"}),
    "rights": (RIGHTS, {"passed"}),
}


@pytest.fixture
def fence(tmp_path, monkeypatch):
    """A fence by which its processes are known among all others."""
    copy = Path(shutil.copy(sandbox.FENCE, tmp_path / f"fence_{os.urandom(4).hex()}.py"))
    monkeypatch.setattr(sandbox, "FENCE", copy)
    return copy


def left_by(fence: Path) -> list[psutil.Process]:
    """Its processes that live, a moment after."""
    for _ in range(50):
        lines = [(each, each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
        found = [each for each, line in lines if str(fence) in line]
        if not found:
            return []
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_stopped_and_leave_nothing_behind(name, fence):
    code, kinds = HOSTILE[name]
    verdict = run(code, SHORT)
    assert verdict.kind in kinds, verdict
    assert verdict.seconds < 19
    assert len(verdict.output) <= SHORT.output
    assert not left_by(fence)
    assert "made" not in verdict.output
    if name == "rights":
        assert verdict.output.startswith("[]")


def test_a_program_that_sleeps_ends_with_its_time(fence):
    verdict = run(SLEEP, Limits(wall_s=1))
    assert (verdict.kind, verdict.seconds < 5) == ("time-out", True)
    assert not left_by(fence)


def test_a_program_cannot_end_its_runner(fence):
    run(KILL.format(runner=os.getpid()), SHORT)
    assert run("print(1)").passed  # we are here to say so


def test_environment_and_home_stay_unread(monkeypatch, tmp_path):
    monkeypatch.setenv("PLANTED_TOKEN", "planted-in-the-environment")
    secret = tmp_path / "secret"
    secret.write_text("planted-in-a-file")
    verdict = run(READ.format(secret=str(secret)))
    assert verdict.passed, verdict
    assert "planted" not in verdict.output
    assert "root:" not in verdict.output
    assert verdict.output.count("FileNotFoundError") == 5


def test_nothing_is_written_outside(tmp_path):
    outside = [str(tmp_path), str(Path.home()), "/var/tmp", str(ROOT)]
    verdict = run(WRITE.format(outside=outside))
    assert verdict.passed, verdict
    assert "wrote" not in verdict.output
    assert not any((Path(folder) / "planted_by_a_test").exists() for folder in outside)


def test_the_folder_of_one_program_is_new_to_the_next():
    assert run("open('left', 'w').write('x'); assert open('left').read() == 'x'").passed
    assert run("import os; assert os.listdir('.') == [] and os.getcwd() == os.path.expanduser('~')").passed


def test_the_network_is_reached_only_where_that_is_said():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1)
        code = CONNECT.format(port=server.getsockname()[1])
        assert run(code).kind == "refused"
        with pytest.raises(TimeoutError):
            server.accept()
        assert run(code, Limits(network=True)).passed
        server.accept()[0].close()


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("x = 1", "passed"),
        ("def f(:", "syntax error"),
        ("x = '\0'", "syntax error"),
        ("x = '\ud800'", "syntax error"),
        ("(" * 5000, "syntax error"),
        ("assert False", "assertion"),
        ("raise KeyError('a')", "exception: KeyError"),
        ("def f(): return f()\nf()", "exception: RecursionError"),
        ("import sys; sys.exit(0)", "exception: SystemExit"),
        ("import os; os._exit(0)", "exception: SystemExit"),
        ("raise KeyboardInterrupt", "exception: KeyboardInterrupt"),
        ("import ctypes; ctypes.string_at(0)", "exception: SIGSEGV"),
        ("x = bytearray(2**40)", "memory"),
        ("open('/x', 'w')", "refused"),
        ("class E(Exception):\n  def __str__(self): raise SystemExit\nraise E", "exception: E"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n  x: 'int'\nassert A(1).x == 1", "passed"),
        ("import os, json\nfor n in range(3, 20):\n  try: os.write(n, b'{\"fence\": 1}\\n[]\\n\\xff\\n')\n"
         "  except OSError: pass\n1 / 0", "exception: ZeroDivisionError"),
    ],
)  # fmt: skip
def test_each_end_of_a_program_has_its_name(code, name):
    assert run(code).name == name


def test_what_a_program_prints_is_bounded_and_cannot_steer_a_terminal():
    verdict = run("print('\\x1b[2J\\x07\\u202e ä\\tb'); print('y' * 10**6); raise ValueError('\\x1b[1m')")
    assert verdict.output.startswith("\\x1b[2J\\x07\\u202e ä\tb\n")
    assert len(verdict.output) < Limits().output + 50
    assert verdict.message == "ValueError: \\x1b[1m"


def test_fences_side_by_side_do_not_count_each_others_processes():
    code = (
        "import os, time\nfor _ in range(4):\n    os.fork() or (time.sleep(1), os._exit(0))\ntime.sleep(0.5)"
    )
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(run(code).kind)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["passed"] * 4


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes rights away, so needs root's")


@as_root
def test_without_a_fence_nothing_runs(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from kdlib.code.sandbox import run
run("open('{tmp_path}/ran', 'w')")
"""
    less = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    done = subprocess.run([*less, sys.executable, "-c", code], capture_output=True, text=True, env={})
    assert "RunError: no program was run" in done.stderr
    assert "unshare: Operation not permitted" in done.stderr
    assert not (tmp_path / "ran").exists()
    with pytest.raises(RunError, match="another machine"):
        raise sandbox._no_fence("x")


@as_root
def test_the_fence_holds_for_a_user_without_rights_too(tmp_path):
    system = Path("/usr/bin/python3")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    package = shutil.copytree(ROOT / "kdlib" / "code", tmp_path / "kdlib" / "code")
    for file in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "kdlib" / file, tmp_path / "kdlib")
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o55)
    code = f"""
import json, sys
sys.path.insert(0, {str(tmp_path)!r})
from kdlib.code.sandbox import Limits, run
for name, code in json.load(sys.stdin).items():
    verdict = run(code, Limits(cpu_s=1, wall_s=15))
    print(json.dumps([name, verdict.kind, verdict.output[:200], verdict.seconds]))
"""
    able = subprocess.run([*nobody, system, "-c", "import sys; assert sys.version_info >= (3, 11)"])
    if able.returncode:
        pytest.skip("no Python of the system's own that a user can run")
    programs = {name: each[0] for name, each in HOSTILE.items() if name not in ("deaf", "print")} | {
        "write": WRITE.format(outside=["/var/tmp", str(tmp_path)]),
        "read": READ.format(secret="/etc/hostname"),
    }
    done = subprocess.run(
        [*nobody, system, "-B", "-c", code], input=json.dumps(programs), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, kind, output, seconds in map(json.loads, done.stdout.splitlines()):
        assert kind in HOSTILE.get(name, (0, {"passed"}))[1], (name, kind, output)
        assert seconds < 19
        assert not {"wrote", "made", "root:"} & set(output.split()), (name, output)
        assert name != "rights" or output == "[] 65534\n"
    assert len(done.stdout.splitlines()) == len(programs)
    assert not left_by(package / "fence.py")
