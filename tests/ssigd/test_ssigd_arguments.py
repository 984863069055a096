"""Bad input of every entry point is one line that names the argument, before anything long begins."""

import re

import numpy as np
import pytest
import torch

from breaching_ext.ssigd import (
    DSBLO,
    SSIGD,
    BatchedQP,
    EnhancedSSIGD,
    ParametricQP,
    QPLayer,
    QuadraticBilevelProblem,
    SSIGDError,
    StronglyConvexBilevelProblem,
    batched_implicit_gradient,
    certified_finish,
    convex_instance,
    cvxpy_backends,
    dsblo_example,
    implicit_gradient,
    smoothed_gradient,
    theorem_parameters,
)
from breaching_ext.ssigd.experiments import run_experiment
from breaching_ext.ssigd.oracle import GradientOracle

EYE, NAN, INF = np.eye(2), float("nan"), float("inf")
PROBLEM = StronglyConvexBilevelProblem(2)
X = torch.zeros(2)


def problem(**changes):
    data = {
        "Q_upper": EYE, "x_target": [0.0, 0], "c_upper": [1.0, 1], "Q_lower": EYE, "c_lower": [0.0, 0], "P": EYE,
        "A": np.zeros((2, 2)), "B": EYE, "b": [1.0, 1],
    }  # fmt: skip
    return QuadraticBilevelProblem(**{**data, **changes})


CASES = {
    "problem": (lambda: SSIGD("reference"), "problem is a str"),
    "seed -1": (lambda: SSIGD(PROBLEM, seed=-1), "seed=-1 is not possible; valid: a whole number from 0"),
    "seed text": (lambda: DSBLO(PROBLEM, seed="0"), "seed='0'"),
    "q_std inf": (lambda: SSIGD(PROBLEM, q_std=INF), "q_std=inf is not possible; valid: a number from 0"),
    "q_std text": (lambda: SSIGD(PROBLEM, q_std="1e-6"), "q_std='1e-6'"),
    "q_std nan": (lambda: DSBLO(PROBLEM, q_std=NAN), "q_std=nan"),
    "noise": (lambda: SSIGD(PROBLEM, noise_std=-0.1), "noise_std=-0.1"),
    "inexactness": (lambda: GradientOracle(PROBLEM, inexactness=True), "inexactness=True"),
    "mu": (lambda: SSIGD(PROBLEM, mu=INF), "mu=inf is not possible in the regime 'strongly_convex'"),
    "mu text": (lambda: SSIGD(PROBLEM, mu="1"), "mu='1'"),
    "lipschitz": (lambda: SSIGD(PROBLEM, lipschitz=-1.0), "lipschitz=-1.0"),
    "step": (lambda: SSIGD(PROBLEM, regime="convex", step=-0.1), "step=-0.1 is not possible; valid: a number above 0"),
    "step of a strongly convex run": (lambda: SSIGD(PROBLEM, step=0.0), "step=0.0"),
    "beta": (lambda: DSBLO(PROBLEM, beta=-0.1), "beta=-0.1 is not possible; valid: a number from 0 below 1"),
    "gamma1": (lambda: DSBLO(PROBLEM, gamma1=NAN), "gamma1=nan"),
    "gamma2": (lambda: DSBLO(PROBLEM, gamma2=-1.0), "gamma2=-1.0"),
    "iterations float": (lambda: SSIGD(PROBLEM).solve(2.5), "iterations=2.5 is not possible; valid: a whole number"),
    "iterations none": (lambda: DSBLO(PROBLEM).solve(None), "iterations=None"),
    "iterations -1": (lambda: DSBLO(PROBLEM).solve(-1), "iterations=-1"),
    "every": (lambda: SSIGD(PROBLEM).solve(2, checkpoint_every=0), "checkpoint_every=0"),
    "x0 list": (lambda: SSIGD(PROBLEM).solve(2, [0.0, 0.0]), "x0 is a list; expected a tensor of real numbers"),
    "x0 nan": (lambda: SSIGD(PROBLEM).solve(2, X * NAN), "x0 holds NaN or infinity"),
    "x0 complex": (lambda: SSIGD(PROBLEM).solve(2, X * 1j), "x0 is a tensor of torch.complex64"),
    "x0 shape": (lambda: DSBLO(PROBLEM).solve(2, X[None]), "x0 has shape (1, 2); expected (2,)"),
    "certified iterations": (lambda: SSIGD(PROBLEM).solve_certified("100"), "iterations='100'"),
    "finish_gradients": (lambda: SSIGD(PROBLEM).solve_certified(9, finish_gradients=2.5), "finish_gradients=2.5"),
    "finish": (
        lambda: SSIGD(StronglyConvexBilevelProblem(2, upper_y_weight=0.5)).solve_certified(9, finish_gradients=4),
        "expected f linear in y",
    ),
    "T": (lambda: EnhancedSSIGD(PROBLEM, False).solve(T=0), "T=0"),
    "T float": (lambda: EnhancedSSIGD(PROBLEM, False).solve(T=1.5), "T=1.5"),
    "enhanced beta": (lambda: EnhancedSSIGD(PROBLEM, False).solve(beta=-1), "beta=-1"),
    "tolerance": (lambda: certified_finish(convex_instance(2), [X], tolerance=-1.0), "tolerance=-1.0"),
    "max_gradients": (lambda: certified_finish(convex_instance(2), [X], max_gradients=1), "max_gradients=1"),
    "point": (lambda: certified_finish(convex_instance(2), [X[:1]]), "a point has shape (1,); expected (2,)"),
    "point nan": (lambda: certified_finish(convex_instance(2), [X * NAN]), "a point holds NaN"),
    "epsilon": (lambda: theorem_parameters(INF, 1.0, 1.0, 1.0), "epsilon=inf"),
    "radius": (lambda: theorem_parameters(0.1, 0.0, 1.0, 1.0), "radius=0.0"),
    "large epsilon": (lambda: theorem_parameters(1e3, 1.0, 1.0, 1.0), "epsilon=1000.0 makes beta="),
    "small epsilon": (lambda: theorem_parameters(1e-9, 1.0, 1.0, 1.0), "epsilon=1e-09 makes beta=1.0"),
    "variance": (lambda: theorem_parameters(0.1, 1.0, -1.0, 1.0), "variance=-1.0"),
    "theorem's lipschitz": (lambda: theorem_parameters(0.1, 1.0, 1.0, "1"), "lipschitz='1'"),
    "x list": (lambda: implicit_gradient(PROBLEM, [0.0, 0.0]), "x is a list"),
    "x bool": (lambda: implicit_gradient(PROBLEM, X == 0), "x is a tensor of torch.bool"),
    "q array": (lambda: implicit_gradient(PROBLEM, X, np.zeros(2)), "q is a ndarray"),
    "q shape": (lambda: implicit_gradient(PROBLEM, X, torch.zeros(3)), "q has shape (3,); expected (2,)"),
    "option": (lambda: implicit_gradient(PROBLEM, X, tol=1), "tol is no option of backend='kkt'; valid: none"),
    "option of cvxpylayers": (
        lambda: implicit_gradient(PROBLEM, X, backend="cvxpylayers", step=1),
        "step is no option of backend='cvxpylayers'; valid: solver_args",
    ),
    "fd's step": (lambda: cvxpy_backends.fd_gradient(PROBLEM, X, step=0.0), "step=0.0"),
    "batched x": (lambda: batched_implicit_gradient(PROBLEM, np.zeros((3, 2))), "x is a ndarray"),
    "batched shape": (lambda: batched_implicit_gradient(PROBLEM, torch.zeros(3, 3)), "expected (2,) or (N, 2)"),
    "batched nan": (lambda: batched_implicit_gradient(PROBLEM, torch.full((3, 2), NAN)), "x holds NaN"),
    "smoothed q": (lambda: smoothed_gradient(PROBLEM, X, [[0.0, 0.0]]), "q is a list"),
    "Q ragged": (lambda: ParametricQP([[1.0, 0], [1.0]], EYE), "Q is no array of real numbers"),
    "Q complex": (lambda: ParametricQP(EYE * 1j, EYE), "Q is no array of real numbers"),
    "G text": (lambda: ParametricQP(EYE, "box"), "G is no array of real numbers: 'box'"),
    "no variables": (lambda: ParametricQP(np.zeros((0, 0)), np.zeros((0, 0))), "n of at least 1"),
    "min_margin": (lambda: ParametricQP(EYE, EYE, min_margin=-1.0), "min_margin=-1.0"),
    "c text": (lambda: ParametricQP(EYE, EYE).solve("zero", [1.0, 1.0]), "c is no array of real numbers"),
    "h ragged": (lambda: ParametricQP(EYE, EYE).solve([0.0, 0.0], [[1.0], [1.0, 2.0]]), "h is no array"),
    "layer's Q": (lambda: QPLayer("eye", EYE), "Q is no array of real numbers"),
    "layer's G": (lambda: QPLayer(torch.eye(2), torch.eye(2) * 1j), "G is a tensor of torch.complex64"),
    "layer's c": (lambda: QPLayer(EYE, EYE)([0.0, 0.0], torch.ones(2)), "c is a list"),
    "layer's h": (lambda: QPLayer(EYE, EYE)(X, np.ones(2)), "h is a ndarray"),
    "batch's c": (lambda: BatchedQP(ParametricQP(EYE, EYE)).solve(EYE, torch.ones(2, 2)), "c is a ndarray"),
    "steps": (lambda: BatchedQP(ParametricQP(EYE, EYE), polish_steps=-1), "polish_steps=-1"),
    "ADMM's steps": (lambda: BatchedQP(ParametricQP(EYE, EYE), admm_steps=0.5), "admm_steps=0.5"),
    "Q_upper": (lambda: problem(Q_upper=[1.0, 1.0]), "Q_upper has shape (2,); expected (2, 2)"),
    "x_target": (lambda: problem(x_target=0.0), "x_target has shape (); expected one dimension"),
    "b": (lambda: problem(b=1.0), "b has shape ()"),
    "P text": (lambda: problem(P="eye"), "P is no array of real numbers"),
    "x_lower nan": (lambda: problem(x_lower=NAN), "x_lower exceeds x_upper, or one of them holds NaN"),
    "x_lower inf": (lambda: problem(x_lower=INF), "expected a non-empty box"),
    "x_upper shape": (lambda: problem(x_upper=[1.0, 2.0, 3.0]), "x_upper has shape (3,); expected (2,) or a number"),
    "constant": (lambda: problem(constant=NAN), "constant=nan"),
    "problem's min_margin": (lambda: problem(min_margin="0"), "min_margin='0'"),
    "dim": (lambda: StronglyConvexBilevelProblem(2.0), "dim=2.0 is not possible; valid: a whole number from 1"),
    "dim_lower": (lambda: StronglyConvexBilevelProblem(2, dim_lower=0), "dim_lower=0"),
    "rows": (lambda: StronglyConvexBilevelProblem(2, num_constraints=-1), "num_constraints=-1"),
    "problem's seed": (lambda: StronglyConvexBilevelProblem(2, "box"), "seed='box'"),
    "condition": (lambda: StronglyConvexBilevelProblem(2, condition=0.5), "condition=0.5"),
    "coupling": (lambda: StronglyConvexBilevelProblem(2, coupling=NAN), "coupling=nan"),
    "weight": (lambda: StronglyConvexBilevelProblem(2, upper_y_weight=-1.0), "upper_y_weight=-1.0"),
    "x_bound": (lambda: StronglyConvexBilevelProblem(2, x_bound=-2.0), "x_bound=-2.0"),
    "convex dim": (lambda: convex_instance(0), "dim=0"),
    "convex seed": (lambda: convex_instance(2, -1), "seed=-1"),
    "paper's size": (lambda: dsblo_example(10, 10, -1), "constraints=-1"),
    "paper's low": (lambda: dsblo_example(3, 3, 2, low=1.0), "low=1.0 is not possible; valid: a number below 1"),
    "starts": (
        lambda: run_experiment({
            "experiment": "nonconvex", "dim": 2, "seeds": [0], "starts": 0, "iterations": 2, "ssigd": {}, "dsblo": {},
        }),
        "starts=0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_that_names_it(name, monkeypatch):
    def sample(self, *arguments):
        raise AssertionError("the run has begun")

    monkeypatch.setattr(GradientOracle, "sample", sample)
    monkeypatch.setattr(cvxpy_backends, "available", lambda package="cvxpylayers": True)
    call, message = CASES[name]
    with pytest.raises(SSIGDError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_and_whole_numbers_are_taken():
    assert SSIGD(PROBLEM, q_std=np.float32(0), seed=np.int64(3), mu=np.float64(1), lipschitz=2).solve(np.int32(2))
    assert DSBLO(PROBLEM, beta=0, gamma1=1, gamma2=np.float32(2)).solve(1, torch.tensor([1, 0]))
    assert implicit_gradient(PROBLEM, torch.tensor([1, 0])).dtype == torch.float64


def test_tensors_that_require_a_gradient_and_lists_are_taken():
    c = torch.tensor([-3.0, 0.5], requires_grad=True)
    single = ParametricQP(torch.eye(2, requires_grad=True), EYE.tolist())
    assert single.solve(c, torch.ones(2)).y.tolist() == [1.0, -0.5]
    assert BatchedQP(single).solve(c.detach()[None], torch.ones(1, 2)).y.tolist() == [[1.0, -0.5]]  # float32
    layer = QPLayer(EYE.tolist(), EYE)
    assert layer(c, torch.ones(2, dtype=torch.int64)).tolist() == [1.0, -0.5]
