"""Make a recorded graph shorter without changing a number: views that change nothing, and what is done twice.

torch.func folds the candidates' axis in and out around every operation, and the derivative of a derivative does many
things again that were done before. A graph shows both. torch's own pass for the latter (`fx_graph_cse`, private) takes
graphs without writes in place; recorded ones have them (`relu_`), and must not take more memory either.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default)
#: Operations whose result shares its input's memory, element by element.
VIEWS = (
    *_RESHAPES,
    _aten.alias.default,
    _aten.expand.default,
    _aten.permute.default,
    _aten.slice.Tensor,
    _aten.transpose.int,
)
#: What torch's schemas do not tell: results that share memory with their input, and statistics that are written.
_SHARING = ("_unsafe_view", "channel_shuffle", "native_channel_shuffle", "unsafe_split", "unsafe_split_with_sizes")
_WRITING = ("batch_norm", "rrelu_with_noise")
#: By how much a graph may take more memory at its peak, for results that are kept because they are needed again.
MORE_MEMORY = 1.02


def shorten(graph: Graph) -> None:
    """Drop idle views, and operations done before. Where a tensor's shape is changed in place, all stay."""
    if not any(torch.Tag.inplace_view in getattr(node.target, "tags", ()) for node in graph.nodes):
        drop_idle_views(graph)
        merge_duplicates(graph)


def drop_idle_views(graph: Graph) -> None:
    """Let users of a view that changes nothing, or that another view follows, use what it is a view of.

    torch.func moves the candidates' axis to where it is already. A view shares its memory, so nothing depends on which
    of them is read or written.
    """
    for node in graph.nodes:
        if node.target not in VIEWS:
            continue
        source = node.args[0]
        if node.target in _RESHAPES and source.target in _RESHAPES and source.args[0].meta["val"].is_contiguous():
            source = source.args[0]
            node.replace_input_with(node.args[0], source)
        before, after = source.meta["val"], node.meta["val"]
        if before.shape == after.shape and before.stride() == after.stride():
            node.replace_all_uses_with(source)


def merge_duplicates(graph: Graph) -> None:
    """Let users of an operation that was done before, on the same values, use the earlier result.

    Memory that has been written in place since then holds other values, so writes count. Memory that is written, or
    that the graph returns, stays its own. Random operations, what torch does not describe, and what would have to be
    kept where the graph takes the most memory, are done again.
    """
    memory = _Memory(graph)
    if memory.given_is_written:
        return
    lives = _Lives(graph, memory)
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        memory.pass_by(node)
        key = _key(node, memory)
        if key is None:
            continue
        first = seen.get(key)
        if first is not None and lives.can_wait(first, node):
            node.replace_all_uses_with(first)
            graph.erase_node(node)
        else:
            seen[key] = node  # the latest is kept for the shortest time


class _Memory:
    """Which results of a graph share memory, and how often that has been written where a pass over the graph stands.

    Attributes:
        given_is_written: whether the graph writes into its inputs or into tensors from outside.
    """

    def __init__(self, graph: Graph) -> None:
        self._group: dict[Node, Node] = {}
        for node in graph.nodes:
            for source in _sources(node):
                self.join(node, source)
        self._writes: Counter[Node] = Counter()
        written = {self.of(node) for writer in graph.nodes for node in _written(writer)}
        *_, output = graph.nodes
        self._own = written | {self.of(node) for node in output.all_input_nodes}
        given = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
        self.given_is_written = any(self.of(node) in written for node in given)

    def of(self, node: Node) -> Node:
        """Return the node that stands for all that share this one's memory."""
        while node in self._group:
            node = self._group[node]
        return node

    def pass_by(self, node: Node) -> None:
        """Count what a node writes."""
        self._writes.update({self.of(written) for written in _written(node)})

    def writes(self, node: Node) -> int:
        """Return how often a node's memory has been written so far."""
        return self._writes[self.of(node)]

    def is_own(self, node: Node) -> bool:
        """Whether a node's memory is written somewhere or returned, so that nobody else may have it."""
        return self.of(node) in self._own

    def join(self, node: Node, other: Node) -> None:
        """Let two nodes share memory from now on."""
        node, other = self.of(node), self.of(other)
        if node is not other:
            self._group[node] = other


class _Lives:
    """How many bytes of results a graph holds while each of its nodes runs."""

    def __init__(self, graph: Graph, memory: _Memory) -> None:
        self._memory = memory
        self._spans: dict[Node, tuple[int, int]] = {}
        self._bytes: dict[Node, int] = {}
        for position, node in enumerate(graph.nodes):
            for used in (node, *node.all_input_nodes):
                owner = memory.of(used)
                birth, _ = self._spans.get(owner, (position, position))
                self._spans[owner] = birth, position
                self._bytes[owner] = 0 if owner.op in ("placeholder", "get_attr") else _bytes(owner)
        changes = [0] * (len(graph.nodes) + 1)
        for owner, (birth, death) in self._spans.items():
            changes[birth] += self._bytes[owner]
            changes[death + 1] -= self._bytes[owner]
        self._held = list(accumulate(changes))
        self._most = MORE_MEMORY * max(self._held)

    def can_wait(self, first: Node, again: Node) -> bool:
        """Whether `first` can be kept until all that uses `again` has run; if so, it is."""
        kept, spared = self._memory.of(first), self._memory.of(again)
        if kept is spared:
            return True
        (birth, death), (next_birth, next_death) = self._spans[kept], self._spans[spared]
        between = range(death + 1, next_birth)
        if max((self._held[position] for position in between), default=0) + self._bytes[kept] > self._most:
            return False
        for position in between:
            self._held[position] += self._bytes[kept]
        self._spans[kept] = birth, max(death, next_death)
        self._memory.join(again, first)
        return True


def _bytes(node: Node) -> int:
    tensors = [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _key(node: Node, memory: _Memory) -> Any:
    """Return what tells whether two nodes have the same values; None where a node must stay."""
    if node.op == "get_attr":
        return "get_attr", node.target
    operation = _operation(node)
    if operation is None and node.target is not operator.getitem:
        return None
    if operation is not None and torch.Tag.nondeterministic_seeded in operation.tags:
        return None
    if any(_written(node)) or (memory.is_own(node) and not any(_sources(node))):
        return None
    arguments = _frozen(node.args), _frozen(sorted(node.kwargs.items()))
    return node.target, arguments, tuple(memory.writes(source) for source in node.all_input_nodes)


def _operation(node: Node) -> OpOverload | None:
    """Return the operation of a node where torch's schemas describe it; None for anything else."""
    return node.target if isinstance(node.target, OpOverload) and node.target.namespace == "aten" else None


def _frozen(value: Any) -> Any:
    """Return an argument as something to compare by: 1, 1.0 and True are different, and so are 0.0 and -0.0."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return value if isinstance(value, Node) else (type(value), repr(value))


def _sources(node: Node) -> Iterator[Node]:
    """Yield the nodes whose memory a node's result may share."""
    operation = _operation(node)
    if node.target is operator.getitem or (operation is not None and _name(operation) in _SHARING):
        yield node.all_input_nodes[0]
    elif operation is not None:
        yield from _annotated(node, operation, writes=False)
    elif node.op == "call_function":
        yield from node.all_input_nodes


def _written(node: Node) -> Iterator[Node]:
    """Yield the nodes into whose memory a node writes."""
    if node.op in ("placeholder", "get_attr", "output") or node.target is operator.getitem:
        return
    operation = _operation(node)
    if operation is not None and not any(part in _name(operation) for part in _WRITING):
        yield from _annotated(node, operation, writes=True)
    else:
        yield from node.all_input_nodes  # nobody says what it does


def _name(operation: OpOverload) -> str:
    return operation._schema.name.removeprefix("aten::")


def _annotated(node: Node, operation: OpOverload, writes: bool) -> Iterator[Node]:
    """Yield the arguments that an operation's schema marks as shared with its result, or as written."""
    arguments = operation._schema.arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | dict(node.kwargs)
    for argument in arguments:
        if argument.alias_info is not None and (argument.alias_info.is_write or not writes):
            for leaf in tree_leaves(given.get(argument.name)):
                if isinstance(leaf, Node):
                    yield leaf
