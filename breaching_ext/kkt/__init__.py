"""Reconstruction from weights: networks, training to near-stationarity, extraction through the KKT conditions."""

from .extraction import Extraction, ExtractionOptions
from .models import MLP, HomogeneousNetwork, SmallConv, build_network
from .nearest import nearest
from .problem import build_problem
from .published import load_checkpoint, network_from_checkpoint
from .recipe import Recipe
from .release import release
from .span import singular_values_in_span
from .training import train, train_or_load

__all__ = [
    "MLP",
    "Extraction",
    "ExtractionOptions",
    "HomogeneousNetwork",
    "Recipe",
    "SmallConv",
    "build_network",
    "build_problem",
    "load_checkpoint",
    "nearest",
    "network_from_checkpoint",
    "release",
    "singular_values_in_span",
    "train",
    "train_or_load",
]
