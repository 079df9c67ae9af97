"""Running programs that a model wrote: in kernel namespaces, under limits, and nowhere else.

Each program gets a Python process of its own that has no network, sees a read-only system without anyone's home, writes
to one scratch folder in memory, knows nothing of our environment, and may use so much time, memory and so many
processes. When it ends, or is ended, all that it started ends with it.

The namespaces are made by bubblewrap where it is installed, else by util-linux (``unshare``, ``mount``, ``setpriv``).
Which of them works is found once, by asking a sandboxed program what it can do. Where neither does, nothing is run.
"""

import atexit
import itertools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from harness.errors import UserError

_KIB, _MIB, _GIB = 2**10, 2**20, 2**30
_SCRATCH = "/scratch"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
_SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives")
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    "HOME": _SCRATCH,
    "TMPDIR": _SCRATCH,
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_LONGEST_REPORT = 64 * _KIB
_LONGEST_START = 120.0  # seconds until the limits are set; a busy machine needs a few
_PERIOD = 0.05  # seconds between looks at the clock
_MEMORY_PERIOD = 0.2  # seconds between looks at the memory in use, which cost more


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        cpu_seconds: processor time of each of its processes.
        seconds: wall-clock time from the moment the program starts.
        memory: bytes; the address space of each process, and what all of them hold together.
        processes: processes and threads at a time.
        scratch: bytes in the scratch folder, and in any one file.
    """

    cpu_seconds: int = 3
    seconds: float = 30.0
    memory: int = 2 * _GIB
    processes: int = 16
    scratch: int = 64 * _MIB


@dataclass(frozen=True)
class Outcome:
    """How a program ended: it ran to its end without an exception (``passed``), or ``detail`` says what happened."""

    passed: bool
    detail: str


@dataclass(frozen=True)
class Mechanism:
    """A way to make namespaces: ``command`` gives the words before those of the program to be run."""

    name: str
    command: Callable[[Limits], list[str]]


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Run Python source in the sandbox.

    The program runs as ``exec(program, {})`` in the interpreter of this process, with its installed packages; what it
    prints is thrown away. It passes if it reaches its end: leaving early, by ``sys.exit`` too, is no pass.

    Raises:
        UserError: this machine offers no sandbox.
        RuntimeError: a sandbox that worked before could not be set up.
    """
    return _run(mechanism(), program, limits or Limits())


def run_programs(programs: Sequence[str], limits: Limits | None = None, workers: int | None = None) -> list[Outcome]:
    """`run_program` for each, ``workers`` at a time (by default one for each processor, at most 8), in their order."""
    mechanism()
    with ThreadPoolExecutor(workers or min(8, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(lambda program: run_program(program, limits), programs))


@cache
def mechanism() -> Mechanism:
    """What makes the sandbox on this machine; found once.

    Raises:
        UserError: nothing here gives the guarantees; says why, and what to install.
    """
    found, reasons = working_mechanisms()
    if found:
        return found[0]
    raise UserError(
        f"sandbox: this machine offers none, so programs that a model wrote are not run ({'; '.join(reasons)}); "
        "install bubblewrap (for example: sudo apt-get install bubblewrap), or leave out the tasks that run code"
    )


def working_mechanisms() -> tuple[list[Mechanism], list[str]]:
    """Every mechanism that holds its promises here, best first, and for each of the others why not."""
    found, reasons = [], []
    for candidate, needs in ((BUBBLEWRAP, _bubblewrap_needs()), (UTIL_LINUX, _util_linux_needs())):
        missing = [program for program in needs if shutil.which(program) is None]
        reason = f"{', '.join(missing)} not installed" if missing else _broken_promise(candidate)
        if reason:
            reasons.append(f"{candidate.name}: {reason}")
        else:
            found.append(candidate)
    return found, reasons


def _broken_promise(candidate: Mechanism) -> str:
    """Why a mechanism cannot be used; empty where a program inside finds all as promised."""
    try:
        outcome = _run(candidate, _PROBE, replace(Limits(), cpu_seconds=10, seconds=120.0))
    except (RuntimeError, OSError) as error:
        return " ".join(str(error).split())[:200]
    return "" if outcome.passed else outcome.detail


# What a program inside may not be able to do. It tries nothing that would harm a machine without a sandbox.
_PROBE = f"""
import os, socket
with open("/proc/self/uid_map") as file:
    assert os.getuid() or file.read().split()[1] != "0", "root's processes are not counted"
assert [name for _, name in socket.if_nameindex()] in ([], ["lo"]), "the network is there"
assert os.getppid() in (0, 1), "processes of the machine are seen"
assert "PROBE_SECRET" not in os.environ, "the environment is seen"
with open("/proc/self/status") as file:
    status = dict(line.split(":\\t", 1) for line in file if ":\\t" in line)
assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, "there are privileges left"
assert status["NoNewPrivs"].strip() == "1", "privileges can be gained"
for folder in ("/", "/usr", "/dev", "/proc/sys/kernel"):
    assert os.statvfs(folder).f_flag & os.ST_RDONLY or not os.access(folder, os.W_OK), folder + " can be written"
for folder in ("/root", "/home", "/tmp", "/run", "/var", "/etc/shadow"):
    assert not os.path.exists(folder) or os.access(folder, os.W_OK) is False, folder + " is seen"
with open("{_SCRATCH}/probe", "w") as file:
    file.write("the one place for files")
"""


# -- One program ------------------------------------------------------------------------------------------------------

# The first thing inside. It limits itself before it reads a word of the program, and cannot go back. Its verdict holds
# a number that the program does not know, so that only the end of the program passes.
_RUNNER = """
def run():
    import json, os, resource, sys, traceback
    given = json.load(sys.stdin)
    for name, (soft, hard) in given["limits"].items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    report, null, me = os.dup(1), os.open(os.devnull, os.O_RDWR), os.getpid()
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    write, leave, same, dumps = os.write, os._exit, os.getpid, json.dumps
    describe = traceback.format_exception_only
    program, number = given["program"], given["number"]
    write(report, b"started\\n")
    try:
        exec(compile(program, "<program>", "exec"), {})
        detail = ""
    except BaseException as error:
        detail = describe(error)[-1].strip()[:2000] or "an exception"
    if same() == me:
        write(report, (dumps([number, detail]) + "\\n").encode())
    leave(0)
run()
"""


def _run(candidate: Mechanism, program: str, limits: Limits) -> Outcome:
    number = os.urandom(16).hex()
    given = {"program": program, "number": number, "limits": _rlimits(limits)}
    process = subprocess.Popen(
        [*candidate.command(limits), sys.executable, "-I", "-B", "-c", _RUNNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_ENVIRONMENT,
        cwd="/",
        start_new_session=True,
    )
    try:
        conversation = _Conversation(process, given, limits)
        stopped = conversation.hold()
    finally:
        _end(process)
    if conversation.verdict is not None:
        return Outcome(not conversation.verdict, conversation.verdict or "passed")
    if not conversation.report.startswith(b"started\n"):
        said = conversation.errors.decode(errors="replace").strip() or stopped or f"exit code {process.returncode}"
        raise RuntimeError(f"sandbox: {candidate.name} could not start a program: {said}")
    return Outcome(False, stopped or _cause_of_death(process.returncode))


def _rlimits(limits: Limits) -> dict[str, tuple[int, int]]:
    """Soft and hard limits of each process; one second more for those that catch the signal of the soft one."""
    return {
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_CPU": (limits.cpu_seconds, limits.cpu_seconds + 1),
        "RLIMIT_AS": (limits.memory, limits.memory),
        "RLIMIT_FSIZE": (limits.scratch, limits.scratch),
        "RLIMIT_NOFILE": (256, 256),
        "RLIMIT_NPROC": (limits.processes, limits.processes),
    }


class _Conversation:
    """Gives the program to the sandbox and listens, up to a size: a program cannot fill our memory by talking."""

    def __init__(self, process: subprocess.Popen[bytes], given: dict[str, Any], limits: Limits) -> None:
        self._process = process
        self._given = json.dumps(given).encode()
        self._verdict_begins = json.dumps([given["number"]])[:-1].encode()
        self._limits = limits
        self.report, self.errors = b"", b""

    @property
    def verdict(self) -> str | None:
        """What went wrong, empty if nothing did; None while the program has not ended by itself."""
        for line in self.report.splitlines(keepends=True):
            if line.startswith(self._verdict_begins) and line.endswith(b"\n"):
                return json.loads(line)[1]
        return None

    def hold(self) -> str:
        """Returns at the verdict, at the end of the process, or when a limit is passed: then says which."""
        began, started, looked = time.monotonic(), None, time.monotonic()
        with selectors.DefaultSelector() as selector:
            assert self._process.stdin and self._process.stdout and self._process.stderr
            selector.register(self._process.stdin, selectors.EVENT_WRITE, self._give)
            selector.register(self._process.stdout, selectors.EVENT_READ, self._hear_report)
            selector.register(self._process.stderr, selectors.EVENT_READ, self._hear_errors)
            for pipe in list(selector.get_map().values()):
                os.set_blocking(pipe.fd, False)
            while True:
                ended = self._process.poll() is not None
                for key, _ in selector.select(0 if ended else _PERIOD):
                    if not key.data():
                        selector.unregister(key.fileobj)
                if ended or self.verdict is not None:
                    return ""
                now = time.monotonic()
                if started is None:
                    started = now if b"\n" in self.report else None
                    if now - began > _LONGEST_START:
                        return f"not started within {_LONGEST_START:.0f} s"
                elif now - started > self._limits.seconds:
                    return f"timed out: more than {self._limits.seconds:g} s"
                elif now - looked > _MEMORY_PERIOD:
                    looked = now
                    if _resident(self._process.pid) > self._limits.memory:
                        return f"out of memory: its processes hold more than {self._limits.memory} bytes"

    def _give(self) -> bool:
        assert self._process.stdin
        try:
            self._given = self._given[os.write(self._process.stdin.fileno(), self._given) :]
        except BrokenPipeError:  # it ended before it listened; how is said on the other pipes
            self._given = b""
        if not self._given:
            self._process.stdin.close()
        return bool(self._given)

    def _hear_report(self) -> bool:
        assert self._process.stdout
        heard = os.read(self._process.stdout.fileno(), _LONGEST_REPORT)
        self.report += heard
        return bool(heard) and len(self.report) < _LONGEST_REPORT

    def _hear_errors(self) -> bool:
        assert self._process.stderr
        heard = os.read(self._process.stderr.fileno(), _LONGEST_REPORT)
        self.errors += heard
        return bool(heard) and len(self.errors) < _LONGEST_REPORT


def _resident(pid: int) -> int:
    """Bytes that a process and all below it hold in memory; pages that several share are counted for each."""
    total = 0
    try:
        for child in psutil.Process(pid).children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        return 0
    return total


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a sandbox: the group's death takes the first process of the namespace along, and that one all others."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None and not pipe.closed:
            pipe.close()


def _cause_of_death(code: int) -> str:
    number = -code if code < 0 else code - 128
    if number == signal.SIGXCPU:
        return "timed out: its processor time is used up"
    if number in set(signal.Signals):
        return f"ended by {signal.Signals(number).name}"
    return f"left early with exit code {code}"


# -- Mechanisms -------------------------------------------------------------------------------------------------------


def _visible() -> tuple[list[str], dict[str, str]]:
    """What a program sees of the machine, read only: the system's programs and libraries, and our Python.

    Returns:
        Folders and files, none inside another, and symbolic links with their targets.
    """
    wanted = [*_SYSTEM, *_SETTINGS, sys.prefix, sys.base_prefix, str(Path(sys.base_prefix).resolve())]
    links = {path: os.readlink(path) for path in wanted if path in _SYSTEM and os.path.islink(path)}
    paths = sorted({path for path in wanted if path not in links and os.path.exists(path)})
    inside = [path for path in paths if any(path != other and Path(path).is_relative_to(other) for other in paths)]
    return [path for path in paths if path not in inside], links


_NO_PRIVILEGES = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
_users = itertools.count()


def _drop_privileges() -> list[str]:
    """For root: become a user that owns nothing. The kernel counts the processes of each user, except root's, so each
    program is a user of its own."""
    user = str(0x7000_0000 + os.getpid() % 2**20 * 256 + next(_users) % 256)
    return ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", *_NO_PRIVILEGES, "--"]


def _is_root() -> bool:
    return os.geteuid() == 0


def _bubblewrap_needs() -> list[str]:
    return ["bwrap", "setpriv"] if _is_root() else ["bwrap"]


def _bubblewrap(limits: Limits) -> list[str]:
    paths, links = _visible()
    command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session"]
    command += ["--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if _is_root():
        # Without a user namespace, in which root could not become anyone else; what setpriv needs stays until then.
        command += ["--cap-drop", "ALL"]
        command += [word for name in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP") for word in ("--cap-add", name)]
    else:
        command += ["--unshare-user"]
    # Parents are named, since bubblewrap would make them for their owner alone.
    parents = dict.fromkeys(str(parent) for path in paths for parent in reversed(Path(path).parents[:-1]))
    command += [word for parent in parents for word in ("--perms", "0755", "--dir", parent)]
    command += [word for path in paths for word in ("--ro-bind", path, path)]
    command += [word for path, target in links.items() for word in ("--symlink", target, path)]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    command += ["--perms", "1777", "--size", str(limits.scratch), "--tmpfs", _SCRATCH]
    command += ["--remount-ro", "/", "--chdir", _SCRATCH, "--"]
    return command + (_drop_privileges() if _is_root() else [])


def _util_linux_needs() -> list[str]:
    return ["unshare", "setpriv", "mount", "umount", "pivot_root", "sh"]


def _util_linux(limits: Limits) -> list[str]:
    paths, links = _visible()
    # unshare itself ends with us, and the namespace's first process ends with unshare.
    command = ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--fork", "--kill-child"]
    command += ["--mount", "--net", "--pid", "--ipc", "--uts"]
    command += [] if _is_root() else ["--user", "--map-root-user"]
    command += ["sh", "-c", _NEW_ROOT, "sandbox", _mount_point(), str(limits.scratch)]
    command += [*paths, "--", *itertools.chain.from_iterable(links.items()), "--"]
    return command + (_drop_privileges() if _is_root() else ["setpriv", *_NO_PRIVILEGES, "--"])


# What bubblewrap does, in mount(8): a root in memory, the visible paths bound read-only, the old root out of reach.
# The shell stays as the first process of the namespace: when the program ends, it ends, and so does all that is left.
_NEW_ROOT = """
set -eu
new=$1 size=$2
shift 2
mount -t tmpfs -o mode=755,size=1m,nosuid,nodev sandbox "$new"
cd "$new"
mkdir dev proc old scratch
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p ".$1"; else mkdir -p ".${1%/*}"; : > ".$1"; fi
    mount --bind "$1" ".$1"
    mount -o remount,bind,ro,nosuid,nodev ".$1"
    shift
done
shift
while [ "$1" != -- ]; do
    ln -s "$2" ".$1"
    shift 2
done
shift
for device in null zero full random urandom; do
    : > dev/$device
    mount --bind /dev/$device dev/$device
done
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t tmpfs -o "mode=1777,size=$size,nosuid,nodev" scratch scratch
pivot_root . old
cd /
umount -l /old
rmdir /old
mount -o remount,bind,ro,nosuid,nodev /
cd /scratch
set +e
"$@"
exit $?
"""


@cache
def _mount_point() -> str:
    """An empty folder to mount on; the mounts are seen in the namespaces only."""
    folder = tempfile.mkdtemp(prefix="palimpsest-sandbox-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


BUBBLEWRAP = Mechanism("bubblewrap", _bubblewrap)
UTIL_LINUX = Mechanism("util-linux", _util_linux)
