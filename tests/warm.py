"""Processes of Python that skip the imports: `Popen([sys.executable, "-m", MODULE, ...])`, or "-c", forks a server that has done them.

A rank, torchrun or `exfm` needs 2 to 6 s of a core before its first own line. Where the fixture `warm` is asked for, such a
command, also one that such a process starts itself, gets a process of its own all the same, with its own pid, session,
environment, folder and output; signals and exit codes are the system's. Two things differ: its parent is the server, and
/proc shows the server's command. Everything else is started as ever.
"""

import array
import contextlib
import inspect
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing import process, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

SOCKET = "EXFM_TEST_WARM"  # the variable with the server's address
COLD = subprocess.Popen
SIGNATURE = inspect.signature(COLD._execute_child)  # type: ignore[attr-defined]
FAILED = 1 << 8  # the wait status of a process whose server is gone
HEAD, PID = 16, 12  # bytes: the length of a text, a process id


def program_of(command: Any) -> list[str]:
    """["-m", MODULE, ...] or ["-c", CODE, ...] where a command is this interpreter with one of them and no other option but -u."""
    if SOCKET not in os.environ or isinstance(command, str | bytes | os.PathLike):
        return []
    python, *rest = map(os.fspath, command)
    rest = rest[rest[:1] == ["-u"] :]
    return rest if python == sys.executable and rest[:1] in (["-m"], ["-c"]) else []


class Warm(COLD):  # type: ignore[misc,valid-type]
    """subprocess.Popen whose Python commands are forked."""

    _link: socket.socket | None = None

    def _execute_child(self, *args: Any, **kwargs: Any) -> None:
        asked = SIGNATURE.bind(self, *args, **kwargs).arguments
        command = program_of(asked["args"])
        if not command:
            return super()._execute_child(*args, **kwargs)
        env = asked["env"]
        what = {
            "args": command,
            "env": dict(os.environ if env is None else env) | {SOCKET: os.environ[SOCKET]},
            "cwd": os.fspath(asked["cwd"] or os.getcwd()),
            "session": bool(asked["start_new_session"]),
            "by": os.getpid(),
        }
        own = [asked[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        fds = [n if fd == -1 else fd for n, fd in enumerate(own)]
        self._link = _ask(what, fds)
        self.pid = int(_exactly(self._link, PID))
        self._link.setblocking(False)
        self._child_created = True
        self._close_pipe_fds(*(asked[n] for n in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")))
        return None

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._link is None:
            return super()._try_wait(wait_flags)
        if not select.select([self._link], [], [], 0 if wait_flags else None)[0]:
            return 0, 0
        said = self._link.recv(64)
        self._link.close()
        return self.pid, int(said) if said else FAILED

    def _internal_poll(self, *args: Any, **kwargs: Any) -> int | None:
        if self._link is None:
            return super()._internal_poll(*args, **kwargs)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid == self.pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def _ask(what: dict[str, Any], fds: Sequence[int] = ()) -> socket.socket:
    link = socket.socket(socket.AF_UNIX)
    link.connect(os.environ[SOCKET])
    text = json.dumps(what).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    link.sendmsg([b"%*d" % (HEAD, len(text))], rights)
    link.sendall(text)
    return link


def _exactly(link: socket.socket, size: int) -> bytes:
    """No more: what comes next may be there already."""
    text = b""
    while len(text) < size:
        piece = link.recv(size - len(text))
        if not piece:
            raise RuntimeError("the other end of a warm process's connection is gone")
        text += piece
    return text


def forked(under: Path | str = "") -> list[dict[str, Any]]:
    """Forked processes that still run and have the text in their command: pid, args, by (who started it), rank, a number or None."""
    if SOCKET not in os.environ:
        return []
    with _ask({"list": True}) as link:
        found = json.loads(_exactly(link, int(_exactly(link, HEAD))))
    return [f for f in found if any(str(under) in arg for arg in f["args"])]


# ---------------------------------------------------------------- the server


def serve(address: str, life: Connection) -> None:
    """Fork what is asked for until `life` is closed, then kill what is left."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess.Popen = subprocess_handler.Popen = Warm  # type: ignore[misc]
    server = Server(address)
    life.send_bytes(b"ready")
    server.loop(life)


class Server:
    def __init__(self, address: str) -> None:
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(address)
        self.listening.listen(64)
        self.running: dict[int, tuple[dict[str, Any], socket.socket]] = {}  # by the process's pidfd

    def loop(self, life: Connection) -> None:
        while True:
            ready = select.select([self.listening, life, *self.running], [], [])[0]
            if life in ready:
                break
            for pidfd in [fd for fd in ready if fd in self.running]:
                self._buried(int(pidfd))  # type: ignore[call-overload]
            if self.listening in ready:
                self._answer(self.listening.accept()[0])
        for what, _ in self.running.values():
            os.kill(what["pid"], signal.SIGKILL)

    def _buried(self, pidfd: int) -> None:
        what, link = self.running.pop(pidfd)
        status = os.waitpid(what["pid"], 0)[1]
        os.close(pidfd)
        with contextlib.suppress(OSError):  # who asked may be gone
            link.sendall(str(status).encode())
        link.close()

    def _answer(self, link: socket.socket) -> None:
        head, fds, _, _ = socket.recv_fds(link, HEAD, 3)
        what = json.loads(_exactly(link, int(head)))
        if "list" in what:
            shown = [{k: w[k] for k in ("pid", "args", "by", "rank")} for w, _ in self.running.values()]
            text = json.dumps(shown).encode()
            link.sendall(b"%*d" % (HEAD, len(text)) + text)
            return link.close()
        rank = what["env"].get("RANK")
        what["rank"] = None if rank is None else int(rank)
        what["pid"] = os.fork()
        if what["pid"] == 0:
            become(what, fds, link)
        for fd in fds:
            os.close(fd)
        self.running[os.pidfd_open(what["pid"])] = what, link
        return None


def become(what: dict[str, Any], fds: list[int], link: socket.socket) -> NoReturn:
    """Be a fresh Python with that program, to the end of this process."""
    code = 1
    # no trace of the server's own place in pytest's family of processes
    process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    tracker = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None  # type: ignore[attr-defined]
    try:
        if what["session"]:
            os.setsid()
        link.sendall(b"%*d" % (PID, os.getpid()))  # now its process group can be signalled
        for n, fd in enumerate(fds):
            os.dup2(fd, n)
        os.closerange(3, 4096)
        os.environ.clear()
        os.environ.update(what["env"])
        os.chdir(what["cwd"])
        sys.path[0] = what["cwd"]
        code = _run(*what["args"])
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(code)


def _run(kind: str, program: str, *arguments: str) -> int:
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
    sys.argv = [program if kind == "-m" else kind, *arguments]
    try:
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        _flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    threading._shutdown()  # type: ignore[attr-defined]
    return 0


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
