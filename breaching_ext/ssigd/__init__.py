"""Exact, certified implicit gradients for bilevel problems with a linearly constrained lower level.

A side module: it imports nothing from the attacks.

Example:
    >>> import torch
    >>> from breaching_ext.ssigd import SSIGD, StronglyConvexBilevelProblem, implicit_gradient
    >>> problem = StronglyConvexBilevelProblem(5, seed=0)
    >>> implicit_gradient(problem, torch.zeros(5)).shape
    torch.Size([5])
    >>> result = SSIGD(problem, regime="weakly_convex").solve(100)
"""

from breaching_ext.ssigd.backends import implicit_gradient
from breaching_ext.ssigd.batched import BatchedQP, BatchedSolution
from breaching_ext.ssigd.dsblo import DSBLO, theorem_parameters
from breaching_ext.ssigd.enhanced import EnhancedSSIGD
from breaching_ext.ssigd.errors import (
    DegenerateError,
    InfeasibleError,
    LICQError,
    NonFiniteError,
    NotCertifiedError,
    NotStronglyConvexError,
    SSIGDError,
)
from breaching_ext.ssigd.finish import CertifiedPoint, certified_finish
from breaching_ext.ssigd.gradients import (
    batched_implicit_gradient,
    coupling_free_gradient,
    smoothed_gradient,
)
from breaching_ext.ssigd.history import BilevelResult
from breaching_ext.ssigd.instances import (
    Optimum,
    convex_instance,
    convex_optimum,
    dsblo_example,
    enumerate_optimum,
)
from breaching_ext.ssigd.layer import QPLayer
from breaching_ext.ssigd.problem import QuadraticBilevelProblem
from breaching_ext.ssigd.qp import ParametricQP
from breaching_ext.ssigd.reference import StronglyConvexBilevelProblem
from breaching_ext.ssigd.solution import QPSolution
from breaching_ext.ssigd.ssigd import SSIGD

__all__ = [
    "DSBLO",
    "SSIGD",
    "BatchedQP",
    "BatchedSolution",
    "BilevelResult",
    "CertifiedPoint",
    "DegenerateError",
    "EnhancedSSIGD",
    "InfeasibleError",
    "LICQError",
    "NonFiniteError",
    "NotCertifiedError",
    "NotStronglyConvexError",
    "Optimum",
    "ParametricQP",
    "QPLayer",
    "QPSolution",
    "QuadraticBilevelProblem",
    "SSIGDError",
    "StronglyConvexBilevelProblem",
    "batched_implicit_gradient",
    "certified_finish",
    "convex_instance",
    "convex_optimum",
    "coupling_free_gradient",
    "dsblo_example",
    "enumerate_optimum",
    "implicit_gradient",
    "smoothed_gradient",
    "theorem_parameters",
]
