"""Schedules against torch's and their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from breaching_ext.optimizer_study.schedules import (
    SCHEDULES,
    Cosine,
    Fixed,
    StepDrop,
    WarmRestarts,
    create_schedule,
)

EPOCHS = st.floats(0, 149.99)


def torch_factors(build, epochs):
    """Learning rates of a torch scheduler that is stepped once an epoch, with base rate 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build(optimizer)
    factors = []
    for _ in range(epochs):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


def test_step_drop_is_torchs():
    want = torch_factors(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [30, 60, 80], 0.1), 100)
    assert [StepDrop(100).factor(epoch) for epoch in range(100)] == pytest.approx(want, rel=1e-12)


def test_cosine_is_torchs():
    want = torch_factors(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100), 100)
    assert [Cosine(100).factor(epoch) for epoch in range(100)] == pytest.approx(want, abs=1e-12)


def test_warm_restarts_are_torchs_also_within_an_epoch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10, 2)
    ours = WarmRestarts(150)
    for index in range(600):
        scheduler.step(index / 4)
        assert ours.factor(index / 4) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)


@given(epoch=EPOCHS, name=st.sampled_from(SCHEDULES), epochs=st.integers(1, 150))
def test_factors_lie_between_zero_and_one_and_start_at_one(epoch, name, epochs):
    schedule = create_schedule(name, epochs)
    assert schedule.factor(0.0) == 1.0
    assert 0.0 <= schedule.factor(epoch) <= 1.0
    assert schedule.period(epoch) >= 1


@given(epoch=EPOCHS, t0=st.integers(1, 12), t_mult=st.integers(1, 4))
def test_a_moment_lies_in_its_period(epoch, t0, t_mult):
    """The period has the length T₀·m^k, and the time since its start is less than that."""
    since, length = WarmRestarts(150, t0, t_mult).locate(epoch)
    assert 0 <= since < length
    start, size = 0, t0
    while start + size <= epoch:
        start, size = start + size, size * t_mult
    assert (length, since) == (size, pytest.approx(epoch - start, abs=1e-9))


@pytest.mark.parametrize(
    ("epochs", "end", "expected", "ends"),
    [
        (100, "down", 70, True),
        (100, "up", 150, True),
        (100, "exact", 100, False),
        (70, "down", 70, True),
        (70, "up", 70, True),
        (4, "down", 4, False),
        (4, "up", 10, True),
    ],
)
def test_restarts_end_with_a_period(epochs, end, expected, ends):
    schedule = WarmRestarts(epochs, end=end)
    assert schedule.epochs == expected
    assert schedule.describe()["ends_at_period_end"] is ends
    if ends:
        assert schedule.factor(expected - 1e-6) < 1e-9
        assert schedule.factor(expected) == 1.0


@given(epochs=st.integers(1, 1000))
def test_fixed_and_cosine_end_where_they_should(epochs):
    assert Fixed(epochs).factor(epochs) == 1.0
    assert math.isclose(Cosine(epochs).factor(epochs), 0.0, abs_tol=1e-15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_schedule("linear", 10), "schedule='linear'.*fixed, step_drop, cosine, warm_restarts"),
        (lambda: Cosine(0), "epochs=0"),
        (lambda: WarmRestarts(10, t0=0), "t0=0"),
        (lambda: WarmRestarts(10, end="middle"), "end='middle'.*down, up, exact"),
        (lambda: StepDrop(10, (0.5, 0.2)), "fractions"),
    ],
)
def test_wrong_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_description_tells_schedules_apart():
    """Records and checkpoints go by it."""
    told = [create_schedule("step_drop", 10, gamma=gamma).describe() for gamma in (0.1, 0.5)]
    told.append(create_schedule("step_drop", 10, fractions=(0.5,)).describe())
    assert len({str(one) for one in told}) == 3
    with pytest.raises(ValueError, match="gama"):
        create_schedule("step_drop", 10, gama=0.1)
