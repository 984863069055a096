"""Named errors of the QP layer: each message says which input is at fault and what to do about it."""

from __future__ import annotations


class SSIGDError(ValueError):
    """Base of every error that this module raises about a problem it was given."""


class NonFiniteError(SSIGDError):
    """An input or a result holds NaN or infinity."""


class NotStronglyConvexError(SSIGDError):
    """The lower-level Hessian Q is not (numerically) positive definite."""


class InfeasibleError(SSIGDError):
    """No y satisfies G y ≤ h."""


class DegenerateError(SSIGDError):
    """The strict-complementarity margin is below the threshold that the caller asked for."""


class LICQError(DegenerateError):
    """The active rows of G are linearly dependent, so the multipliers and the gradient are not unique."""


class NotCertifiedError(SSIGDError):
    """A solver stopped at a point that does not satisfy the KKT conditions."""
