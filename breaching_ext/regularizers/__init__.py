"""Regularizers that Breaching lacks: group consistency with registration, total variation for any channel count."""

from .aligners import ALIGNERS, align
from .group import GroupRegularization, registered_consensus
from .total_variation import AnyChannelTotalVariation

__all__ = ["ALIGNERS", "AnyChannelTotalVariation", "GroupRegularization", "align", "registered_consensus"]
