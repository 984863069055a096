"""Two parts of a compilation for the CPU that do not need its Python, moved to a second core.

torch.compile is mostly Python on one core. While that traces and writes code, a second process can already find out
which vector instructions the C++ compiler masters and translate the headers that all compiled code includes: torch
keeps both on disk, and finds them there when it comes to them. And where a compilation has several C++ files, they can
be translated at the same time. Neither changes what is compiled; where something fails, torch does it all by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

#: What the second process runs: a small compilation with the same options, which leaves on disk what a large one needs.
#: The vector instructions come first, because a large compilation asks for them first.
_AHEAD = """
import json, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no temporary folder behind
import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa
pick_vec_isa()
torch.compile(lambda x: x.sin() + 1, dynamic=False, options=json.loads(sys.argv[1]))(torch.ones(64))
"""
#: Seconds that the second process gets to end when it is told to.
PATIENCE = 5.0


@contextlib.contextmanager
def on_a_second_core(options: Mapping[str, Any]) -> Iterator[None]:
    """Compile faster inside of this block; with a single core it changes nothing.

    Args:
        options: torch.compile's, plain values only.
    """
    if cores() < 2:
        yield
        return
    ahead = contextlib.nullcontext() if _was_here() else _ahead(options)
    with ahead, _files_at_once():
        yield


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _was_here() -> bool:
    """Whether torch's cache says that an earlier compilation already found out what the second process would."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    marks = ("*/*.load_ok", "*/*.so")  # what torch 2.14 leaves of its tests, and torch 2.8 to 2.13
    return any(next(Path(cache_dir()).glob(mark), None) for mark in marks)


@contextlib.contextmanager
def _ahead(options: Mapping[str, Any]) -> Iterator[None]:
    """Run the second process; one that is not needed any more is told to end, and its compiler, too."""
    process = None
    with contextlib.suppress(OSError, ValueError):  # no interpreter to start, as in frozen programs
        process = start_ahead(options)
    try:
        yield
    finally:
        if process is not None:
            _end(process)


def start_ahead(options: Mapping[str, Any]) -> subprocess.Popen:
    """Start the second process, in a session of its own so that Ctrl-C does not reach its compiler."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _AHEAD, json.dumps(dict(options))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _end(process: subprocess.Popen) -> None:
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, number)
            else:
                process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
            return


@contextlib.contextmanager
def _files_at_once() -> Iterator[None]:
    """Have torch's C++ files translated at the same time, where this torch does so where it is expected."""
    from torch._inductor import codecache

    name = "_worker_compile_cpp"
    original = getattr(codecache, name, None)
    if original is None:
        yield
        return
    setattr(codecache, name, objects_first(original))
    try:
        yield
    finally:
        setattr(codecache, name, original)


def objects_first(build_all: Callable[..., None]) -> Callable[..., None]:
    """Return torch's function that builds what is not there, with the files that are linked last built before, at once.

    `build_all` comes last and builds whatever this leaves undone, so it is also what raises errors.

    Args:
        build_all: called with the path of a lock and with builders, of which the last links what the others translate.
    """

    def build(lock_path: str, builders: Sequence[Any], *others: Any, **named: Any) -> None:
        with contextlib.suppress(Exception):
            _at_once(lock_path, builders[:-1])
        build_all(lock_path, builders, *others, **named)

    return build


def _at_once(lock_path: str, builders: Sequence[Any]) -> None:
    from torch.utils._filelock import FileLock

    if len(builders) < 2:
        return
    with FileLock(lock_path, timeout=600):
        missing = [builder for builder in builders if not Path(builder.get_target_file_path()).exists()]
        with ThreadPoolExecutor(len(builders)) as pool:
            list(pool.map(lambda builder: builder.build(), missing))
