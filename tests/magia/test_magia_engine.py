"""The engine: candidates stay apart, budgets are counted, schedules and grids are followed."""

from __future__ import annotations

import pytest
import torch
from test_magia_objective import setting

from breaching_ext.matching.magia_engine import Annealing, MagiaEngine, OptimizerOptions, Pyramid, Schedule
from breaching_ext.matching.subset_matching import SubsetMatching, SubsetTerm
from breaching_ext.matching.track import Track, advance, settle
from breaching_ext.regularizers.color_tv import color_total_variation

ONE_GRID = Pyramid((1,), ())


def engine(matching, starts, seeds=(1, 2, 3), iterations=3, **options) -> MagiaEngine:
    options.setdefault("options", OptimizerOptions(inner_iterations=4))
    return MagiaEngine(matching, starts, list(seeds), iterations, **options)


def run(made: MagiaEngine, iterations: int = 3) -> list[torch.Tensor]:
    alive = torch.ones(len(made.starts[0]), dtype=torch.bool)
    for iteration in range(iterations):
        made.step(iteration, alive)
    return made.parameters


def matching(term: SubsetTerm | None = None, method: str = "list", **options) -> tuple[SubsetMatching, list]:
    target, _, _, pixels, logits, _ = setting(**options)
    return SubsetMatching(target, term or SubsetTerm(), color_total_variation, method=method), [pixels, logits]


@pytest.mark.parametrize("optimizer", ["l-bfgs", "adam"])
@pytest.mark.parametrize("term", ["none", "residual"])
@pytest.mark.parametrize("grids", [ONE_GRID, Pyramid((2, 1), (0.5,))])
def test_each_candidate_follows_its_own_run(optimizer, term, grids):
    objective, starts = matching(SubsetTerm(term, 0.5))
    options = {
        "options": OptimizerOptions(optimizer, 1.0 if optimizer == "l-bfgs" else 0.05, inner_iterations=4),
        "pyramid": grids,
    }
    together = run(engine(objective, starts, **options))
    for n in range(3):
        alone = run(engine(objective, [s[n : n + 1] for s in starts], seeds=[n + 1], **options))
        for joint, single in zip(together, alone, strict=True):
            torch.testing.assert_close(joint[n], single[0], rtol=0, atol=1e-8)


def test_stacked_and_listed_candidates_walk_the_same_path():
    listed, starts = matching(SubsetTerm("mean", 0.5), "list")
    stacked, _ = matching(SubsetTerm("mean", 0.5), "vmap")
    for a, b in zip(run(engine(listed, starts)), run(engine(stacked, starts)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_the_objective_falls():
    objective, starts = matching()
    made = engine(objective, starts, annealing=Annealing(0.001), iterations=10)
    alive = torch.ones(3, dtype=torch.bool)
    values = torch.stack([made.step(i, alive).values for i in range(10)])
    assert (values[-1] < 0.1 * values[0]).all()


@pytest.mark.parametrize(("term", "share"), [("none", 0.0), ("mean", 0.5)])
def test_subset_gradients_count_by_their_share(term, share):
    """Three candidates, three outer steps of 4 evaluations, S/B = 2/4."""
    objective, starts = matching(SubsetTerm(term))
    for options in (OptimizerOptions("adam", 0.01, 4), OptimizerOptions(inner_iterations=4)):
        made = engine(objective, starts, options=options, pyramid=ONE_GRID)
        run(made)
        assert made.gradient_evaluations == 3 * 3 * 4
        assert made.full_gradients == pytest.approx(3 * 3 * 4 * (1 + share))


def test_evaluations_are_counted_across_grids():
    objective, starts = matching()
    made = engine(objective, starts, pyramid=Pyramid((4, 2, 1), (0.3, 0.3)))
    run(made)
    assert made.gradient_evaluations == 3 * 3 * 4


@pytest.mark.parametrize(("redraw", "draws"), [("step", 3), ("closure", 3 + 12)])
def test_how_often_subsets_are_drawn(redraw, draws, monkeypatch):
    objective, starts = matching(SubsetTerm("mean"))
    made = engine(objective, starts, schedule=Schedule(redraw=redraw), pyramid=ONE_GRID)
    seen = []
    original = made._draw
    monkeypatch.setattr(made, "_draw", lambda iteration: (original(iteration), seen.append(made._subsets.clone())))
    run(made)
    assert len(seen) == draws
    assert all(len(set(row.tolist())) == 2 for subsets in seen for row in subsets)


def test_the_schedule_sets_the_subset_size():
    objective, starts = matching(SubsetTerm("mean"))
    made = engine(objective, starts, iterations=4, schedule=Schedule("linear_inc_total"))
    sizes = []
    for iteration in range(4):
        made.step(iteration, torch.ones(3, dtype=torch.bool))
        sizes.append(made._subsets.shape[1])
    assert sizes == [1, 2, 3, 4]


def test_a_dead_candidate_does_not_move():
    objective, starts = matching()
    made = engine(objective, starts, pyramid=ONE_GRID)
    made.step(0, torch.tensor([True, False, True]))
    assert torch.equal(made.parameters[0][1], starts[0][1])
    assert not torch.equal(made.parameters[0][0], starts[0][0])


def test_a_candidate_whose_value_is_not_finite_is_reported_and_the_others_go_on():
    objective, starts = matching(per_candidate=True)
    objective.target.gradients[0][1] = float("inf")
    made = engine(objective, starts, pyramid=ONE_GRID)
    alive = torch.ones(3, dtype=torch.bool)
    values = made.step(0, alive).values
    assert values.isfinite().tolist() == [True, False, True]
    assert torch.equal(made.parameters[0][1], starts[0][1])
    assert made.parameters[0].isfinite().all()


def test_overwriting_chosen_candidates():
    objective, starts = matching()
    made = engine(objective, starts, pyramid=ONE_GRID)
    made.overwrite([torch.zeros_like(s) for s in starts], torch.tensor([False, True, False]))
    assert made.parameters[0][1].abs().max() == 0
    assert torch.equal(made.parameters[0][0], starts[0][0])


@pytest.mark.parametrize("optimizer", ["l-bfgs", "adam"])
def test_a_restored_engine_goes_on_bit_for_bit(optimizer):
    objective, starts = matching(SubsetTerm("residual", 0.5))
    options = {"options": OptimizerOptions(optimizer, 0.05, 4), "pyramid": Pyramid((2, 1), (0.4,)), "iterations": 5}
    straight = run(engine(objective, starts, **options), 5)
    first, alive = engine(objective, starts, **options), torch.ones(3, dtype=torch.bool)
    for iteration in range(3):
        first.step(iteration, alive)
    second = engine(objective, [torch.zeros_like(s) for s in starts], **options)
    second.restore(first.state(), 3)
    for iteration in (3, 4):
        second.step(iteration, alive)
    assert all(torch.equal(a, b) for a, b in zip(second.parameters, straight, strict=True))
    assert second.gradient_evaluations == 3 * 5 * 4


@pytest.mark.parametrize(("annealing", "expected"), [(Annealing(0.1, 1.0), True), (Annealing(1.0, 0.1), False)])
def test_points_compare_unless_the_prior_grows(annealing, expected):
    objective, starts = matching()
    made, everybody = engine(objective, starts, annealing=annealing, iterations=6), torch.ones(3, dtype=torch.bool)
    assert [made.step(i, everybody).comparable for i in range(3)] == [True, expected, expected]
    again = engine(objective, starts, annealing=annealing, iterations=6)
    again.restore(made.state(), 3)
    assert again.step(3, everybody).comparable == expected


@pytest.mark.parametrize("kind", ["none", "released", "mean", "residual"])
@pytest.mark.parametrize("method", ["list", "vmap"])
def test_what_points_are_ranked_by_does_not_know_of_subsets(kind, method):
    """‖G − g*‖² + tv · TV, which is the objective where there is no subset term; also with a group's term."""
    plain, (pixels, logits) = matching()
    other, _ = matching(SubsetTerm(kind, 0.5, "variance"), method)
    for objective in (plain, other):
        objective.extra = lambda x: 0.3 * x.square().mean()
    subsets = torch.tensor([[0, 1, 3], [1, 2, 0], [3, 2, 1]])
    expected, ranked, *_ = plain(pixels, logits, None, 0.07)
    values, found, *_ = other(pixels, logits, subsets, 0.07)
    torch.testing.assert_close(ranked, expected)
    torch.testing.assert_close(found, expected)
    assert (kind == "none") == torch.allclose(values, expected)


@pytest.mark.parametrize(("kind", "rescaling"), [("mean", "none"), ("residual", "ratio"), ("none", "none")])
def test_the_best_point_is_the_one_of_the_least_full_batch_objective(kind, rescaling):
    """With c = S/B, which grows from 1/4 to 1, objectives of early steps are smaller than those of late ones."""
    objective, starts = matching(SubsetTerm(kind, 0.9, rescaling))
    options = {"pyramid": ONE_GRID, "annealing": Annealing(0.001), "schedule": Schedule("linear_inc_total")}
    made = engine(objective, starts, iterations=8, **options)
    track, seen = Track.start(made.parameters), []
    for iteration in range(8):
        before = made.parameters
        advance(made, iteration, track)
        seen.append((before, made._rankings))
    seen.append((made.parameters, made.rankings()))
    asked = made.gradient_evaluations
    settle(made, track)
    assert made.gradient_evaluations == asked + 3
    least = torch.stack([rankings for _, rankings in seen]).min(dim=0)
    torch.testing.assert_close(track.best_values, least.values)
    for n, step in enumerate(least.indices.tolist()):
        assert all(torch.equal(best[n], point[n]) for best, point in zip(track.best, seen[step][0], strict=True))


def test_a_step_that_ends_far_away_does_not_take_the_best_point_with_it():
    """Without a line search the last move of a step is not looked at before the next step."""
    objective, starts = matching()
    made = engine(objective, starts, pyramid=ONE_GRID, iterations=4)
    track = Track.start(made.parameters)
    for iteration in range(2):
        advance(made, iteration, track)
    good = made.parameters
    run_optimizer = made._run_optimizer

    def astray(iteration, done):
        values = run_optimizer(iteration, done)
        made.overwrite([100.0 * stack for stack in made.parameters])
        return values

    made._run_optimizer = astray
    advance(made, 2, track)
    settle(made, track)
    assert all(torch.equal(best, point) for best, point in zip(track.best, good, strict=True))


def test_a_candidate_that_fails_within_a_step_stays_where_the_step_began():
    """That point was evaluated, and is better than where the run started."""
    objective, starts = matching()
    made = engine(objective, starts, pyramid=ONE_GRID, iterations=4)
    track = Track.start(made.parameters)
    advance(made, 0, track)
    good, run_optimizer = made.parameters, made._run_optimizer

    def failing(iteration, done):
        return torch.full_like(run_optimizer(iteration, done), float("nan"))

    made._run_optimizer = failing
    assert advance(made, 1, track).failed.all()
    for found in (track.best, made.parameters):
        assert all(torch.equal(best, point) for best, point in zip(found, good, strict=True))


def test_annealing_is_geometric_and_can_be_off():
    annealing = Annealing(0.01, 1.0)
    assert [annealing.at(p) for p in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([1.0, 0.1, 0.01, 0.01])
    assert Annealing(0.3).at(0.7) == 0.3
    assert Annealing(0.0).at(0.5) == 0.0


def test_grids_switch_at_their_shares():
    grids = Pyramid((4, 2, 1), (0.25, 0.25))
    assert [grids.factor(p) for p in (0.0, 0.24, 0.25, 0.49, 0.5, 1.0)] == [4, 4, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Annealing(-1.0), "weight=-1.0"),
        (lambda: Annealing(0.0, 1.0), "above 0"),
        (lambda: Pyramid((4, 2), (0.5,)), "end with 1"),
        (lambda: Pyramid((2, 1), (0.5, 0.6)), "one per stage"),
        (lambda: Schedule("cubic"), "const1, constk"),
        (lambda: Schedule(l_iter=0), "l_iter=0"),
        (lambda: Schedule(redraw="always"), "step, closure"),
        (lambda: OptimizerOptions("sgd"), "l-bfgs, adam"),
        (lambda: OptimizerOptions(label_scale=0.0), "label_scale"),
    ],
)
def test_bad_options_are_named(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_start_that_is_not_finite_is_refused():
    objective, starts = matching()
    starts[0][1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        engine(objective, starts)


@pytest.mark.parametrize("grids", [ONE_GRID, Pyramid((2, 1), (0.9,))])
def test_a_box_changes_what_is_outside_and_nothing_else(grids):
    """On a coarse grid pixels are not the variables: clipped through pixels and back, it would be blurred."""
    objective, starts = matching()
    made = engine(objective, starts, pyramid=grids)
    box = (torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    before = made.parameters
    assert all(p.min() >= 0 and p.max() <= 1 for p in before[:1])
    made.project(box)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters, before, strict=True))
    with torch.no_grad():
        made._stacks[0][:2] += 0.7
    outside = made.parameters[0]
    made.project(box, torch.tensor([True, False, False]))
    inside = made.parameters[0]
    beyond = [(pixels[0] - 1).clamp_min(0).sum() for pixels in (outside, inside)]
    assert beyond[1] == 0 if grids is ONE_GRID else 0 < beyond[1] < 0.5 * beyond[0]  # a coarse grid gets there in steps
    assert torch.equal(inside[1:], outside[1:])  # not asked for, and not outside


def test_a_boxed_run_that_stays_inside_is_the_run_without_a_box():
    paths = []
    for box in (None, (torch.tensor(-9.0, dtype=torch.float64), torch.tensor(9.0, dtype=torch.float64))):
        objective, starts = matching()
        made = engine(objective, starts, pyramid=Pyramid((2, 1), (0.5,)))
        track = Track.start(made.parameters, box)
        for iteration in range(3):
            advance(made, iteration, track)
        paths.append(made.parameters)
    assert all(torch.equal(a, b) for a, b in zip(*paths, strict=True))
