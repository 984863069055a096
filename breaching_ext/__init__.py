"""Plugin package for Breaching: joint-candidate, label-free and weight-based reconstruction attacks.

Importing this package imports no torch.
"""

__version__ = "0.1.0"
