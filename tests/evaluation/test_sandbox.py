"""The sandbox, attacked: every mechanism that this machine offers, with programs that do what they must not.

An attack passes if it succeeds, and says in an ``AssertionError`` how it was stopped, so that a program that merely
breaks proves nothing. Attacks that do no harm outside are also run outside, where they must succeed.
"""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness.evaluation import sandbox
from harness.evaluation.sandbox import Limits, Mechanism, Outcome

WORKING, REASONS = sandbox.working_mechanisms()
LIMITS = Limits(cpu_seconds=2, seconds=300, memory=2**29, processes=12, scratch=2**23)


@pytest.fixture(params=["bubblewrap", "util-linux"])
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    found = [one for one in WORKING if one.name == request.param]
    if not found:
        pytest.skip("; ".join(reason for reason in REASONS if reason.startswith(request.param)))
    return found[0]


def run(mechanism: Mechanism, program: str, limits: Limits = LIMITS) -> Outcome:
    return sandbox._run(mechanism, textwrap.dedent(program), limits)


def succeeds_outside(program: str, **environment: str) -> bool:
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    return done.returncode == 0


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # on its way out
        return ""


def gone(marker: str) -> bool:
    """No process has the marker in its command line; waits for those that are on their way out."""
    for _ in range(200):
        if not any(marker in command_of(process) for process in psutil.process_iter()):
            return True
        time.sleep(0.05)
    return False


# -- Verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "passed", "detail"),
    [
        ("assert sorted([2, 1]) == [1, 2]", True, "passed"),
        ("import numpy; assert numpy.ones(3).sum() == 3", True, "passed"),
        ("open('file', 'w').write('x'); assert open('/scratch/file').read() == 'x'", True, "passed"),
        ("print('x' * 10**6)", True, "passed"),
        ("assert 1 == 2, 'not equal'", False, "AssertionError: not equal"),
        ("def f(:", False, "SyntaxError"),
        ("f()", False, "NameError"),
        ("import sys; sys.exit(0)", False, "SystemExit"),
        ("import os; os._exit(0)", False, "left early with exit code 0"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", False, "SIGKILL"),
        ("import os\nif os.fork(): os._exit(1)", False, "left early"),  # a child's verdict does not count
        ('import os; os.write(3, b\'["00", ""]\\n\'); os._exit(0)', False, "left early"),  # nor does a forged one
        ("input()", False, "EOFError"),
    ],
)
def test_verdicts(mechanism: Mechanism, program: str, passed: bool, detail: str) -> None:
    outcome = run(mechanism, program)
    assert outcome.passed == passed
    assert detail in outcome.detail


def test_many_programs_keep_their_order() -> None:
    if not WORKING:
        pytest.skip("; ".join(REASONS))
    outcomes = sandbox.run_programs([f"assert {i} % 3" for i in range(12)], LIMITS, workers=3)
    assert [outcome.passed for outcome in outcomes] == [bool(i % 3) for i in range(12)]


# -- Attacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("while True: pass", "timed out: its processor time"),
        ("import time; time.sleep(600)", "timed out: more than 1 s"),
    ],
)
def test_an_endless_loop(mechanism: Mechanism, program: str, detail: str) -> None:
    limits = Limits(cpu_seconds=1, seconds=1 if "sleep" in program else 300)
    outcome = run(mechanism, program, limits)
    assert not outcome.passed
    assert detail in outcome.detail


def test_a_loop_that_catches_the_signal(mechanism: Mechanism) -> None:
    program = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(mechanism, program, Limits(cpu_seconds=1, seconds=300)).detail == "ended by SIGKILL"


def test_a_fork_bomb(mechanism: Mechanism) -> None:
    # A few processes first: the real bomb goes off only where these were stopped.
    few = """
        import os, time
        for count in range(60):
            try:
                pid = os.fork()
            except BlockingIOError:
                assert False, f"stopped at {count}"
            if pid == 0:
                time.sleep(60)
                os._exit(0)
    """
    outcome = run(mechanism, few)
    assert "stopped at" in outcome.detail
    assert int(outcome.detail.split()[-1]) < LIMITS.processes
    bomb = """
        import os
        while True:
            try:
                os.fork()
            except BlockingIOError:
                pass
    """
    outcome = run(mechanism, bomb, Limits(cpu_seconds=2, seconds=2, processes=12))
    assert not outcome.passed
    assert "timed out" in outcome.detail
    assert sandbox._run(mechanism, "assert True", LIMITS).passed


def test_ten_gigabytes(mechanism: Mechanism) -> None:
    assert run(mechanism, "block = bytearray(10 * 2**30)").detail == "MemoryError"
    # Many processes, each within its own limit.
    together = """
        import os, time
        for _ in range(8):
            if os.fork() == 0:
                block = bytearray(os.urandom(2**20)) * 200
                time.sleep(60)
                os._exit(0)
        time.sleep(60)
    """
    assert "out of memory" in run(mechanism, together).detail


def test_a_write_to_the_home_folder(mechanism: Mechanism, tmp_path: Path) -> None:
    name = f"palimpsest-attack-{uuid.uuid4().hex}"
    write = """
        import os
        where, reasons = {folders!r}, []
        for folder in where:
            try:
                os.makedirs(folder, exist_ok=True)
                open(os.path.join(folder, {name!r}), "w").write("was here")
                break
            except OSError as error:
                reasons.append(error.strerror)
        else:
            assert False, "stopped: " + ", ".join(reasons)
    """
    here = Path(__file__).resolve().parent
    folders = [Path.home(), here, tmp_path, Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path("/"), Path("/usr")]
    folders.append(Path(sys.prefix))
    outcome = run(mechanism, write.format(folders=[str(folder) for folder in folders], name=name))
    assert outcome.detail.startswith("AssertionError: stopped: ")
    assert not any((folder / name).exists() for folder in folders)
    assert succeeds_outside(write.format(folders=[str(tmp_path)], name=name))
    assert (tmp_path / name).exists()


def test_a_read_of_the_home_folder(mechanism: Mechanism, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("secret")
    read = f"""
        try:
            open({str(secret)!r}).read()
        except OSError as error:
            assert False, "stopped: " + error.strerror
    """
    assert run(mechanism, read).detail == "AssertionError: stopped: No such file or directory"
    assert succeeds_outside(read)


def test_a_full_scratch_folder(mechanism: Mechanism) -> None:
    fill = """
        try:
            for number in range(100):
                open(f"{number}", "wb").write(bytes(2**20))
        except OSError as error:
            assert False, f"stopped at {number}"
    """
    outcome = run(mechanism, fill)
    assert "stopped at" in outcome.detail
    assert int(outcome.detail.split()[-1]) <= LIMITS.scratch / 2**20


def test_a_read_of_the_environments_secrets(mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_attack")
    read = """
        import glob, os
        found = [repr(dict(os.environ))]
        for file in glob.glob("/proc/[0-9]*/environ"):
            try:
                found.append(open(file).read())
            except OSError:
                continue
        assert "hf_attack" in "".join(found), "stopped: no secret in " + str(len(found)) + " environments"
    """
    assert "stopped: no secret" in run(mechanism, read).detail
    assert succeeds_outside(read)


@pytest.fixture
def listener() -> Iterator[int]:
    """A port of this machine on which someone listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_socket(mechanism: Mechanism, listener: int) -> None:
    connect = f"""
        import socket
        try:
            socket.create_connection(("127.0.0.1", {listener}), timeout=3).close()
        except OSError as error:
            assert False, "stopped: " + str(error)
    """
    assert "stopped: " in run(mechanism, connect).detail
    assert succeeds_outside(connect)
    outside = """
        import socket
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
                datagram.sendto(b"x", ("192.0.2.1", 53))
        except OSError as error:
            assert False, "stopped: " + error.strerror
    """
    assert run(mechanism, outside).detail == "AssertionError: stopped: Network is unreachable"


def test_a_kill_of_the_parent(mechanism: Mechanism) -> None:
    kill = """
        import os, signal
        reasons = []
        for pid in {pids}:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError) as error:
                reasons.append(error.strerror)
        assert not reasons, "stopped: " + ", ".join(reasons)
    """
    victim = subprocess.Popen(["sleep", "600"])
    try:
        outcome = run(mechanism, kill.format(pids=f"(os.getppid(), {victim.pid}, {os.getpid()})"))
        assert "stopped: " in outcome.detail
        assert victim.poll() is None
        assert succeeds_outside(kill.format(pids=f"({victim.pid},)"))
        assert victim.wait() == -signal.SIGKILL
    finally:
        victim.kill()
        victim.wait()


@pytest.mark.parametrize("ending", ["pass", "time.sleep(600)"])
def test_what_a_program_leaves_behind(mechanism: Mechanism, ending: str) -> None:
    marker = uuid.uuid4().hex
    daemon = f"""
        import os, sys, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)  # {marker}"])
            os._exit(0)
        os.wait()
        time.sleep(0.5)
        {ending}
    """
    outcome = run(mechanism, daemon, Limits(seconds=300 if ending == "pass" else 3))
    assert outcome.passed == (ending == "pass")
    assert gone(marker)


def test_nothing_outlives_a_killed_harness(mechanism: Mechanism) -> None:
    marker = uuid.uuid4().hex
    endless = (
        f'import os, sys; os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(99) # {marker}"])'
    )
    harness = f"""
        from harness.evaluation import sandbox
        found = {{one.name: one for one in sandbox.working_mechanisms()[0]}}[{mechanism.name!r}]
        sandbox._run(found, {endless!r}, sandbox.Limits(seconds=90))
    """
    code = textwrap.dedent(harness)
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        for _ in range(600):
            # The harness's own command line holds the marker too.
            inside = [p for p in psutil.Process(process.pid).children(recursive=True) if marker in command_of(p)]
            if inside:
                break
            time.sleep(0.05)
        assert inside
    finally:
        process.kill()
        process.wait()
    assert gone(marker)


def test_a_talkative_program(mechanism: Mechanism) -> None:
    talk = (
        "import os\nfor fd in range(3, 10):\n  try:\n    while True: os.write(fd, b'x' * 4096)\n  except OSError: pass"
    )
    outcome = run(mechanism, talk, Limits(cpu_seconds=2, seconds=2))
    assert not outcome.passed


def test_a_machine_without_a_sandbox(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom harness.errors import UserError\nfrom harness.evaluation import sandbox\n"
        f"os.environ['PATH'] = {str(tmp_path)!r}\n"
        "try:\n    sandbox.run_program(\"open('/tmp/x', 'w')\")\nexcept UserError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "bubblewrap: bwrap" in done.stdout
    assert "install bubblewrap" in done.stdout
    assert done.stdout.count("\n") == 1
