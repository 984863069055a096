"""What a second core takes over of a compilation is right, ends with it, and gives way where it does not work."""

from __future__ import annotations

import inspect
import os
import select
import subprocess
import sys
import threading

import pytest
from torch._inductor import codecache

from breaching_ext.matching import compile_time
from breaching_ext.matching.compilation import options_on_a_cpu

#: A process that starts another one and waits for it; both hold a pipe's end.
PARENT = """
import os, subprocess, sys
fd = int(sys.argv[1])
child = subprocess.Popen(["sleep", "600"], pass_fds=[fd])
os.write(fd, b"!")
child.wait()
"""


class Builder:
    """Stands for torch's: makes a file."""

    def __init__(self, path, before=lambda: None):
        self.path, self.before, self.built = path, before, 0

    def get_target_file_path(self):
        return str(self.path)

    def build(self):
        self.before()
        self.built += 1
        self.path.write_text("built")


def build_what_is_missing(lock_path, builders):
    for builder in builders:
        if not builder.path.exists():
            builder.build()


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(compile_time, "cores", lambda: 2)


def test_the_second_process_leaves_what_torch_looks_for(tmp_path, monkeypatch):
    """With this torch: its options are known to it, it ends well, and torch's cache says what it found."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert not compile_time._was_here()
    assert compile_time.start_ahead(options_on_a_cpu()).wait(300) == 0
    assert compile_time._was_here()


def test_files_that_are_linked_are_built_at_once(tmp_path):
    meet = threading.Barrier(2)
    one, two = (Builder(tmp_path / name, lambda: meet.wait(60)) for name in ("main.o", "optimized.o"))
    linker = Builder(tmp_path / "main.so", lambda: [one.path.read_text(), two.path.read_text()])
    compile_time.objects_first(build_what_is_missing)(str(tmp_path / "lock"), (one, two, linker))
    assert [b.built for b in (one, two, linker)] == [1, 1, 1]


def test_what_is_there_is_not_built_again(tmp_path):
    there, missing, linker = (Builder(tmp_path / name) for name in ("there.o", "missing.o", "all.so"))
    there.build()
    compile_time.objects_first(build_what_is_missing)(str(tmp_path / "lock"), (there, missing, linker))
    assert [b.built for b in (there, missing, linker)] == [1, 1, 1]


def test_a_file_that_cannot_be_built_raises_torchs_own_error(tmp_path):
    def fail():
        raise RuntimeError("no such header")

    builders = (Builder(tmp_path / "good.o"), Builder(tmp_path / "bad.o", fail), Builder(tmp_path / "all.so"))
    with pytest.raises(RuntimeError, match="no such header"):
        compile_time.objects_first(build_what_is_missing)(str(tmp_path / "lock"), builders)


def test_this_torch_builds_where_it_is_expected():
    """Otherwise files are built one after the other, which nobody would notice."""
    assert list(inspect.signature(codecache._worker_compile_cpp).parameters) == ["lock_path", "cpp_builders"]


def test_torch_is_left_as_it_was(two_cores, monkeypatch):
    monkeypatch.setattr(compile_time, "_was_here", lambda: True)
    before, inside = codecache._worker_compile_cpp, []

    def stopped():
        with compile_time.on_a_second_core({}):
            inside.append(codecache._worker_compile_cpp)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert inside[0] is not before is codecache._worker_compile_cpp
    monkeypatch.delattr(codecache, "_worker_compile_cpp")
    with compile_time.on_a_second_core({}):
        pass
    assert not hasattr(codecache, "_worker_compile_cpp")


@pytest.mark.parametrize("why", ["one core", "an earlier compilation"])
def test_no_process_is_started_where_it_would_not_help(two_cores, monkeypatch, why):
    if why == "one core":
        monkeypatch.setattr(compile_time, "cores", lambda: 1)
    monkeypatch.setattr(compile_time, "_was_here", lambda: why != "one core")
    monkeypatch.setattr(compile_time, "start_ahead", lambda options: pytest.fail("started"))
    with compile_time.on_a_second_core({}):
        pass


def test_without_an_interpreter_torch_compiles_by_itself(two_cores, monkeypatch):
    monkeypatch.setattr(compile_time, "_was_here", lambda: False)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with compile_time.on_a_second_core({}):
        pass


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups")
def test_the_second_process_ends_with_the_compilation(two_cores, monkeypatch):
    """With what it started, and beyond the reach of Ctrl-C, which a terminal sends to this process's group."""
    reading, writing = os.pipe()
    start, started = subprocess.Popen, []

    def waiting(*arguments, **options):
        started.append(start([sys.executable, "-c", PARENT, str(writing)], **options, pass_fds=[writing]))
        os.close(writing)
        return started[-1]

    monkeypatch.setattr(compile_time, "_was_here", lambda: False)
    monkeypatch.setattr(compile_time.subprocess, "Popen", waiting)
    with compile_time.on_a_second_core({}):
        assert os.read(reading, 1) == b"!"
        (process,) = started
        assert os.getpgid(process.pid) == process.pid != os.getpgrp()
    assert process.returncode is not None
    assert select.select([reading], [], [], 60)[0], "the grandchild still holds its end of the pipe"
    assert os.read(reading, 1) == b""
    os.close(reading)
