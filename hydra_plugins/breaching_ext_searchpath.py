"""Hydra search-path plugin: Breaching's config lookups also find the configs of breaching_ext.

Hydra imports this file in every Hydra application of the environment, so it imports no torch and does nothing
unless the application's own configs are Breaching's.
"""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from breaching_ext.registration import config_root, register_if_breaching_is_loaded

_ROOTS = ("breaching/config", "breaching/config/attack", "breaching/config/case")


class BreachingExtSearchPathPlugin(SearchPathPlugin):
    """Append the folder of ours that matches whichever of Breaching's three config roots is in use."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """See the class docstring."""
        main = next((entry.path for entry in search_path.get_path() if entry.provider == "main"), None)
        suffix = _matching_suffix(main or "")
        if suffix is None:
            return
        separator = "." if config_root().startswith("pkg://") else "/"
        search_path.append("breaching_ext", separator.join([config_root(), *suffix]))
        register_if_breaching_is_loaded()


def _matching_suffix(path: str) -> list[str] | None:
    """Return the folders below Breaching's config root ([], ["attack"] or ["case"]), or None if it is not its."""
    if path.startswith("pkg://"):
        path = path.removeprefix("pkg://").replace(".", "/")
    path = "/" + path.replace("\\", "/").rstrip("/")
    for root in _ROOTS:
        if path.endswith("/" + root):
            return root.split("/")[2:]
    return None
