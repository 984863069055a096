"""The backends of the implicit gradient against each other and against central differences."""

import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from breaching_ext.ssigd import (
    EnhancedSSIGD,
    InfeasibleError,
    NonFiniteError,
    NotCertifiedError,
    QuadraticBilevelProblem,
    SSIGDError,
    StronglyConvexBilevelProblem,
    batched_implicit_gradient,
    coupling_free_gradient,
    cvxpy_backends,
    enhanced,
    implicit_gradient,
    smoothed_gradient,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of cvxpylayers
extra = pytest.mark.skipif(
    not (cvxpy_backends.available("cvxpy") and cvxpy_backends.available()),
    reason="the extra [ssigd] is not installed",
)


def draw(dim, seed, kind, **options):
    problem = StronglyConvexBilevelProblem(dim, seed=seed, constraints=kind, **options)
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(dim, generator=generator, dtype=torch.float64) - 2
    q = 1e-2 * torch.randn(problem.dim_lower, generator=generator, dtype=torch.float64)
    return problem, x, q


def central_differences(problem, x, q, step=1e-5):
    shifts = step * torch.eye(len(x), dtype=torch.float64)
    values = [problem.objective(x + s, q) - problem.objective(x - s, q) for s in shifts]
    return torch.tensor(values, dtype=torch.float64) / (2 * step)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    dim=st.integers(1, 8),
    lower=st.integers(1, 8),
    kind=st.sampled_from(["box", "coupled"]),
    weight=st.sampled_from([0.0, 0.7]),
)
def test_kkt_is_the_derivative_of_the_objective(seed, dim, lower, kind, weight):
    problem, x, q = draw(dim, seed, kind, dim_lower=lower, upper_y_weight=weight)
    if problem.certified_solution(x, q).margin < 1e-3:  # a kink within the difference step
        return
    gradient = implicit_gradient(problem, x, q)
    torch.testing.assert_close(gradient, central_differences(problem, x, q), rtol=1e-7, atol=1e-7)


@extra
@pytest.mark.parametrize("kind", ["box", "coupled"])
@pytest.mark.parametrize("dim", [3, 10])
@pytest.mark.parametrize(("backend", "tolerance"), [("cvxpylayers", 1e-9), ("fd", 1e-7)])
def test_backends_agree(kind, dim, backend, tolerance):
    problem, x, q = draw(dim, 4, kind, upper_y_weight=0.5)
    exact = implicit_gradient(problem, x, q)
    other = implicit_gradient(problem, x, q, backend=backend)
    assert float((other - exact).norm() / exact.norm()) < tolerance
    without = implicit_gradient(problem, x, backend=backend)
    assert float((without - implicit_gradient(problem, x)).norm() / exact.norm()) < tolerance


@extra
@pytest.mark.parametrize("backend", ["kkt", "cvxpylayers", "fd"])
def test_gradcheck_of_every_backend(backend):
    problem, x, q = draw(4, 2, "coupled")

    class Objective(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.tensor(problem.objective(x, q), dtype=torch.float64)

        @staticmethod
        def backward(ctx, grad):
            return grad * implicit_gradient(problem, ctx.saved_tensors[0], q, backend=backend)

    assert torch.autograd.gradcheck(Objective.apply, (x.requires_grad_(),), eps=1e-5, atol=1e-7, rtol=1e-7)


@extra
def test_solutions_agree_with_cvxpy():
    problem, x, q = draw(6, 1, "coupled")
    y = torch.from_numpy(problem.certified_solution(x, q).y)
    torch.testing.assert_close(torch.from_numpy(cvxpy_backends.cvxpy_lower_level(problem, x, q)), y, atol=1e-8, rtol=0)
    torch.testing.assert_close(cvxpy_backends.cvxpylayers_solve(problem, x, q), y, atol=1e-8, rtol=0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), dim=st.integers(1, 8), kind=st.sampled_from(["box", "coupled"]))
def test_batch_is_the_loop(seed, dim, kind):
    problem, x, q = draw(dim, seed, kind, upper_y_weight=0.3)
    many = x + 0.3 * torch.randn(7, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = torch.stack([implicit_gradient(problem, point, q) for point in many])
    torch.testing.assert_close(batched_implicit_gradient(problem, many, q), expected, rtol=1e-9, atol=1e-10)


def test_smoothing_is_the_mean_over_perturbations():
    problem, x, _ = draw(5, 3, "box")
    q = 0.3 * torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, error = smoothed_gradient(problem, x, q)
    each = torch.stack([implicit_gradient(problem, x, row) for row in q])
    torch.testing.assert_close(mean, each.mean(dim=0))
    torch.testing.assert_close(error, each.std(dim=0) / 20**0.5)
    with pytest.raises(SSIGDError, match="at least 2"):
        smoothed_gradient(problem, x, q[:1])


def test_lower_level_is_differentiable_in_x_and_q():
    problem, x, q = draw(4, 2, "coupled")
    inputs = (x.requires_grad_(), q.requires_grad_())
    assert torch.autograd.gradcheck(problem.solve_lower_level, inputs, eps=1e-6, atol=1e-8)
    value = problem.upper_objective(x, problem.solve_lower_level(x, q))
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient, implicit_gradient(problem, x, q))


def test_without_coupling_the_implicit_part_is_zero_and_with_it_is_not():
    errors = []
    for seed in range(10):
        problem, x, _ = draw(10, seed, "box")
        exact = implicit_gradient(problem, x)
        errors.append(float((coupling_free_gradient(problem, x) - exact).norm() / exact.norm()))
        uncoupled, x, _ = draw(10, seed, "box", coupling=0.0)
        torch.testing.assert_close(implicit_gradient(uncoupled, x), coupling_free_gradient(uncoupled, x))
    assert min(errors) > 0.05


def test_a_subclass_may_bring_its_own_objective():
    class Quartic(StronglyConvexBilevelProblem):
        def upper_objective(self, x, y):
            return (x**4).sum(-1) + (y**3).sum(-1)

        def upper_gradients(self, x, y):
            return 4 * x**3, 3 * y**2

    problem = Quartic(5, seed=2)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    expected = central_differences(problem, x, None)
    torch.testing.assert_close(implicit_gradient(problem, x), expected, rtol=1e-7, atol=1e-7)


def test_wrong_arguments_are_named():
    problem, x, q = draw(4, 0, "box")
    with pytest.raises(SSIGDError, match=r"backend='autograd' is unknown; expected one of \('kkt'"):
        implicit_gradient(problem, x, backend="autograd")
    with pytest.raises(SSIGDError, match=r"x has shape \(3,\)"):
        implicit_gradient(problem, x[:3])
    with pytest.raises(NonFiniteError, match="q holds NaN"):
        implicit_gradient(problem, x, q * torch.nan)
    with pytest.raises(SSIGDError, match="constraints='ball'"):
        StronglyConvexBilevelProblem(4, constraints="ball")


@extra
def test_infeasible_lower_level_is_an_error_in_every_backend():
    eye = torch.eye(2, dtype=torch.float64)
    rows = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    problem = QuadraticBilevelProblem(
        Q_upper=eye, x_target=[0, 0], c_upper=[1, 1], Q_lower=eye, c_lower=[0, 0], P=eye,
        A=torch.ones(3, 2), B=rows, b=[1.0, 0.0, 0.0],
    )  # fmt: skip
    for backend in ("kkt", "fd", "cvxpylayers"):
        with pytest.raises(InfeasibleError):
            implicit_gradient(problem, torch.tensor([3.0, 3.0]), backend=backend)


@extra
@pytest.mark.parametrize(("options", "message"), [
    ({"backend": "fd", "solver": "FOO"}, "CVXPY fails with solver='FOO'"),
    ({"backend": "fd", "max_iter": 3}, "CVXPY reports user_limit"),
    ({"backend": "cvxpylayers", "solver_args": {"foo": 1}}, "cvxpylayers fails with {'foo': 1}"),
])  # fmt: skip
def test_what_a_library_refuses_is_one_line(options, message):
    problem, x, q = draw(3, 0, "box")
    with pytest.raises(NotCertifiedError, match=message) as caught:
        implicit_gradient(problem, x, q, **options)
    assert "\n" not in str(caught.value)


@extra
def test_without_constraints_cvxpylayers_is_refused_and_the_others_agree():
    eye = torch.eye(2, dtype=torch.float64)
    problem = QuadraticBilevelProblem(
        Q_upper=eye, x_target=[0, 1], c_upper=[1, 1], Q_lower=2 * eye, c_lower=[0, 0], P=eye,
        A=torch.zeros(0, 2), B=torch.zeros(0, 2), b=[],
    )  # fmt: skip
    exact = implicit_gradient(problem, torch.zeros(2))
    assert exact.tolist() == pytest.approx([-0.5, -1.5])
    torch.testing.assert_close(implicit_gradient(problem, torch.zeros(2), backend="fd"), exact, atol=1e-7, rtol=0)
    with pytest.raises(SSIGDError, match="at least one constraint"):
        implicit_gradient(problem, torch.zeros(2), backend="cvxpylayers")


def test_missing_extra_is_said_and_enhanced_falls_back_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(cvxpy_backends, "available", lambda package="cvxpylayers": False)
    monkeypatch.setattr(enhanced, "available", lambda package="cvxpylayers": False)
    monkeypatch.setattr(enhanced, "_fallback_told", False)
    problem, x, _ = draw(4, 0, "box")
    for backend in ("fd", "cvxpylayers"):
        with pytest.raises(ImportError, match=r"breaching-ext\[ssigd\]"):
            implicit_gradient(problem, x, backend=backend)
    with caplog.at_level(logging.WARNING):
        first, second = EnhancedSSIGD(problem, use_cvxpylayers=True), EnhancedSSIGD(problem)
    assert first.backend == second.backend == "kkt"
    assert len(caplog.records) == 1
    torch.testing.assert_close(first.grad_F(x), implicit_gradient(problem, x, first.q))


@extra
def test_enhanced_uses_cvxpylayers_and_keeps_its_signature():
    problem, x, _ = draw(4, 0, "box")
    algorithm = EnhancedSSIGD(problem, use_cvxpylayers=True)
    assert algorithm.backend == "cvxpylayers"
    torch.testing.assert_close(
        algorithm.grad_F(x, None), implicit_gradient(problem, x, algorithm.q), rtol=1e-8, atol=1e-8
    )
    result = algorithm.solve(T=5, beta=0.05, x0=x)
    plain = EnhancedSSIGD(problem, use_cvxpylayers=False).solve(T=5, beta=0.05, x0=x)
    torch.testing.assert_close(result["x_final"], plain["x_final"], rtol=1e-7, atol=1e-7)
    assert len(result["losses"]) == result["iterations"] == 5
    constant = EnhancedSSIGD(problem, use_cvxpylayers=False).solve(T=5, beta=0.05, x0=x, diminishing=False)
    assert constant["result"].history["step"] == pytest.approx([0.05] * 5)


def test_the_module_stands_alone():
    """It needs neither the extra nor anything of the attacks."""
    code = """
import sys
for name in ("cvxpy", "cvxpylayers", "diffcp", "breaching"):
    sys.modules[name] = None
import torch
import breaching_ext.ssigd as ssigd
ssigd.implicit_gradient(ssigd.StronglyConvexBilevelProblem(3), torch.zeros(3))
others = {"attacks", "matching", "regularizers", "evaluation", "data", "run", "optimizer_study"}
loaded = {name.split(".")[1] for name in sys.modules if name.startswith("breaching_ext.")}
assert not loaded & others, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)
