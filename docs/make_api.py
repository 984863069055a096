"""Write docs/api.md, the index of public names, from the package itself: names, signatures, first sentences.

python docs/make_api.py

What is public: everything in the `__all__` of the package, of its subpackages, and of `breaching_ext.selection`; and
what `MORE` names, which the other pages speak of. tests/test_docs.py compares the file with what comes out here.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "breaching_ext"
TARGET = Path(__file__).resolve().parent / "api.md"

#: These first, in this order; what else there is follows by name.
FIRST = ("", ".attacks", ".evaluation", ".regularizers", ".selection", ".data", ".kkt", ".lora")
#: Public names of modules that are no packages of their own.
MORE = {
    f"{PACKAGE}.errors": ("BreachingExtError", "ConfigError", "DatasetUnavailableError", "SharedDataError"),
    f"{PACKAGE}.evaluation.figures": ("save_reconstruction",),
    f"{PACKAGE}.matching.lbfgs": ("BatchedLBFGS",),
    f"{PACKAGE}.matching.magia_schedules": ("Annealing", "Schedule"),
    f"{PACKAGE}.optimizer_study.coupling": ("Coupling", "coupling"),
    f"{PACKAGE}.optimizer_study.data": ("load_fashion_mnist",),
    f"{PACKAGE}.ranks": ("joined",),
    f"{PACKAGE}.registration": ("ATTACK_TYPES", "REGULARIZERS"),
    f"{PACKAGE}.run": ("RunResult", "run"),
}

_LONGEST = 6  # entries of a default that is shown

HEADER = """\
# Public names

Written by `python docs/make_api.py`; do not edit. Each name with its signature and the first sentence of its docstring,
which says the rest (shapes, units, errors): `help(name)`. `...` stands for a default that is longer. A class's own
methods are below it. What is not here may change between versions.
"""


def public() -> dict[str, list[str]]:
    """Return module -> its public names, in the order of the page."""
    package = importlib.import_module(PACKAGE)
    found = [info.name for info in pkgutil.iter_modules(package.__path__, f"{PACKAGE}.") if info.ispkg]
    modules = [PACKAGE + suffix for suffix in FIRST]
    modules += sorted({name for name in found if hasattr(importlib.import_module(name), "__all__")} - set(modules))
    names = {module: list(importlib.import_module(module).__all__) for module in modules}
    for module, more in MORE.items():
        names[module] = list(more)
    return names


def page() -> str:
    """Return the whole page."""
    names = public()
    everywhere = {name for several in names.values() for name in several}
    parts = [HEADER]
    for module_name, several in names.items():
        module = importlib.import_module(module_name)
        parts.append(f"## `{module_name}`\n\n{_wrapped(first_sentence(module.__doc__))}\n")
        again = {id(getattr(module, name)) for name in several} & _listed_below(names, module_name)
        lines = [line for name in several for line in entry(module, name, everywhere, again)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _listed_below(names: dict[str, list[str]], module_name: str) -> set[int]:
    """Return what the sections after a module's list, too; its methods stand there."""
    below = list(names)[list(names).index(module_name) + 1 :]
    return {id(getattr(importlib.import_module(module), name)) for module in below for name in names[module]}


def entry(module: ModuleType, name: str, everywhere: set[str], again: set[int]) -> Iterator[str]:
    """Yield the lines of one name; those of a class's own methods after it, unless it comes `again` further down."""
    thing = getattr(module, name)
    if inspect.isclass(thing):
        kinds = [base.__name__ for base in thing.__bases__ if base.__name__ in everywhere]
        kind = f" A kind of `{kinds[0]}`." if kinds else ""
        yield _item(name + signature(thing), first_sentence(_own_doc(thing)) + kind)
        for method, value in () if id(thing) in again else vars(thing).items():
            plain = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if not method.startswith("_") and _is_ours(plain) and not (plain.__doc__ or "See ").startswith("See "):
                of_class = getattr(thing, method)
                arguments = "" if isinstance(value, property) else signature(of_class, bound=of_class is value)
                yield _item(f".{method}{arguments}", first_sentence(plain.__doc__), level=1)
    elif callable(thing):
        yield _item(name + signature(thing), first_sentence(thing.__doc__))
    else:
        yield _item(name, comment_of(module, name) or _value(thing))


def signature(thing: Any, bound: bool = False) -> str:
    """Return the arguments with their defaults and without types; nothing for an exception or a protocol.

    Args:
        thing: a function or class.
        bound: leave out the first argument, self.
    """
    if inspect.isclass(thing) and (issubclass(thing, BaseException) or getattr(thing, "_is_protocol", False)):
        return ""
    parameters = list(inspect.signature(thing).parameters.values())[bound:]
    shown, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            shown.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={_default(parameter.default)}"
        shown.append(f"{stars}{parameter.name}{default}")
    return f"({', '.join(shown)})"


def first_sentence(doc: str | None) -> str:
    """Return the first paragraph's first sentence as Markdown, roles such as :class:`~a.B` as `B`."""
    paragraph = " ".join(inspect.cleandoc(doc or "").split("\n\n")[0].split())
    paragraph = paragraph.replace("``", "`")
    paragraph = re.sub(r":\w+:`~?([^`]*)`", lambda match: f"`{match[1].rsplit('.', 1)[-1]}`", paragraph)
    sentence = re.split(r"(?<=[a-z0-9)`\]]\.) (?=[A-Z])", paragraph)[0]
    pieces = re.split(r"(`[^`]*`)", sentence)  # code stays as it is
    return "".join(p if p.startswith("`") else re.sub(r"([*<])", r"\\\1", p) for p in pieces)


def comment_of(module: ModuleType, name: str) -> str:
    """Return the comment `#: ...` above the assignment to a name, in this module or in one that it is imported from."""
    home = _home(module, name)
    if home is None:
        return ""
    source, line = home
    said: list[str] = []
    for above in reversed(source.splitlines()[: line - 1]):
        if not above.startswith("#:"):
            break
        said.insert(0, above[2:].strip())
    return first_sentence(" ".join(said))


def _home(module: ModuleType, name: str) -> tuple[str, int] | None:
    """Return the source of the module that assigns a name, and the line."""
    source = inspect.getsource(module)
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return source, node.lineno
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            origin = importlib.import_module("." * node.level + (node.module or ""), module.__package__)
            return _home(origin, name)
    lazy = getattr(module, "_HOME", {})  # names that are imported when they are first used
    return _home(importlib.import_module(f"{module.__name__}.{lazy[name]}"), name) if name in lazy else None


def _own_doc(kind: type) -> str:
    """Return a class's own docstring; what `dataclass` makes up is none."""
    doc = vars(kind).get("__doc__") or ""
    return "" if doc.startswith(f"{kind.__name__}(") else doc


def _is_ours(member: Any) -> bool:
    function = member.fget if isinstance(member, property) else getattr(member, "__wrapped__", member)
    return inspect.isfunction(function) and function.__module__.startswith(PACKAGE)


def _default(value: Any) -> str:
    plain = (bool, int, float, str, type(None))
    if isinstance(value, (tuple, list)) and len(value) <= _LONGEST and all(isinstance(v, plain) for v in value):
        return repr(value)
    if isinstance(value, plain):
        return repr(value)
    return getattr(value, "__name__", "...")  # neither addresses nor what differs from version to version


def _value(thing: Any) -> str:
    """Return what a table or number holds, in one line."""
    if isinstance(thing, (Mapping, tuple, list)):
        kind = "Mapping with the keys" if isinstance(thing, Mapping) else "List of"
        return f"{kind} {', '.join(f'`{key}`' for key in thing)}."
    return f"`{thing!r}`."


def _item(code: str, sentence: str, level: int = 0) -> str:
    indent = "  " * level
    return f"{_wrapped(f'- `{code}`', indent)}\\\n{_wrapped(sentence, indent + '  ', indent + '  ')}"


def _wrapped(text: str, first: str = "", rest: str | None = None) -> str:
    rest = (first + "  " if text.startswith("- ") else "") if rest is None else rest
    return textwrap.fill(text, 118, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
