"""Two processes that share the candidates find what one process finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes

from breaching_ext.errors import ConfigError
from breaching_ext.ranks import Ranks, current, interrupts


def torchrun(root: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(root), str(root / "tests")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCH_HOME": str(cwd)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def shared(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(root, folder, str(root / "tests" / "two_processes.py"), str(folder))
    assert done.returncode == 0, done.stderr
    assert [file.name for file in folder.iterdir()] == ["results.pt"]  # no checkpoint is left behind
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("name", two_processes.CASES)
def test_the_same_result_as_one_process(shared, name):
    result, stats = shared[name]
    expected, expected_stats = two_processes.attack(name)
    assert stats["processes"] == 2
    for key in ("candidates", "data"):
        assert torch.allclose(result[key], expected[key], rtol=0, atol=1e-9)
    assert torch.allclose(result["candidate_scores"], expected["candidate_scores"], rtol=1e-9)
    for key in ("candidate_failures", "gradient_evaluations", "alignments", "alignment_failures", "engine"):
        assert stats[key] == expected_stats[key]
    for trial in range(3):
        key = f"Trial_{trial}_Val"
        assert stats[key] == pytest.approx(expected_stats[key], rel=1e-9)
    assert (name == "failing") == bool(stats["candidate_failures"])


def test_without_consensus_not_a_bit_changes(shared):
    assert torch.equal(shared["alone"][0]["candidates"], two_processes.attack("alone")[0]["candidates"])


def test_a_killed_run_goes_on_bit_for_bit(shared):
    assert torch.equal(shared["resumed"][0]["candidates"], shared["vmap"][0]["candidates"])


def test_ctrl_c_in_one_process_stops_all_with_the_best_so_far(shared):
    result, stats = shared["interrupted"]
    assert stats["interrupted"]
    assert [len(stats[f"Trial_{trial}_Val"]) for trial in range(3)] == [3, 3, 3]
    assert result["data"].isfinite().all()


def test_the_command_under_torchrun_writes_one_set_of_files(root, tmp_path):
    overrides = ["attack.optim.max_iterations=3", "attack.restarts.num_trials=3", "case.user.num_data_points=2"]
    done = torchrun(root, tmp_path, "-m", "breaching_ext", *overrides, "hydra.run.dir=run", "case.model=lenet_zhu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean ") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["processes"] == 2
    assert record["gradient_evaluations"] == 3 * 3
    assert torch.load(tmp_path / "run" / "candidates.pt")["candidates"].shape[0] == 3


@pytest.mark.parametrize(("count", "size"), [(8, 3), (5, 5), (7, 2)])
def test_shares_cover_all_candidates_once(count, size):
    shares = [list(Ranks(rank, size).share(count)) for rank in range(size)]
    assert [candidate for share in shares for candidate in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_candidates_are_refused():
    with pytest.raises(ConfigError, match="num_trials=2 is fewer than the 3 processes"):
        Ranks(0, 3).share(2)


def test_alone_nothing_is_exchanged():
    ranks, value = current(), torch.ones(2)
    assert ranks.size == 1
    assert ranks.total(value) is value
    assert ranks.collect(value, 2) is value
    assert ranks.gather(3) == [3]


def test_noting_ctrl_c_leaves_a_handler_that_was_set_meanwhile(request):
    """With several processes the second Ctrl-C must not end the saving of what the first one stopped."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with interrupts():
        signal.signal(signal.SIGINT, ignoring := lambda number, frame: None)
    assert signal.getsignal(signal.SIGINT) is ignoring
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with interrupts() as noted, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert len(noted) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
