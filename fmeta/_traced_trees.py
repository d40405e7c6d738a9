"""The structure of trees while `torch.compile` traces.

Dynamo's replacements of optree's functions fail on nodes without tensors, such as an empty dict
(torch 2.13 with optree 0.19 and 0.20), so a traced tree is taken apart in plain Python.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

__all__ = ["TracedSpec"]

Tree = Any


class TracedSpec:
    """The structure of a tree, in plain Python; as optree's, with ``None`` as a leaf."""

    def __init__(
        self, kind: Any, keys: list[Any], order: list[Any], children: list[TracedSpec]
    ) -> None:
        self.kind, self.keys, self.order, self.children = kind, keys, order, children
        self.num_leaves: int = 1 if kind is None else sum(c.num_leaves for c in children)

    @classmethod
    def of(cls, tree: Tree, found: list[Any]) -> TracedSpec:
        """The structure of ``tree``, whose leaves are appended to ``found``."""
        if not isinstance(tree, (dict, list, tuple)):
            found.append(tree)
            return cls(None, [], [], [])
        order = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        try:
            keys = sorted(order)
        except TypeError:  # keys of several types: optree keeps their order then, too
            keys = order
        return cls(type(tree), keys, order, [cls.of(tree[k], found) for k in keys])

    def build(self, leaves: list[Any], start: int) -> Tree:
        """The tree with ``leaves`` from ``start`` on."""
        if self.kind is None:
            return leaves[start]
        parts = {}
        for key, child in zip(self.keys, self.children, strict=True):
            parts[key] = child.build(leaves, start)
            start += child.num_leaves
        values = [parts[k] for k in self.order]
        if issubclass(self.kind, dict):
            pairs = zip(self.order, values, strict=True)
            return OrderedDict(pairs) if issubclass(self.kind, OrderedDict) else dict(pairs)
        return self.kind(*values) if hasattr(self.kind, "_fields") else self.kind(values)

    def flatten_up_to(self, tree: Tree) -> list[Any]:
        """What stands in ``tree`` at each leaf."""
        if self.kind is None:
            return [tree]
        if isinstance(tree, dict) if issubclass(self.kind, dict) else type(tree) is self.kind:
            keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
            if set(keys) == set(self.keys):
                rows = zip(self.keys, self.children, strict=True)
                return [x for k, child in rows for x in child.flatten_up_to(tree[k])]
        raise ValueError(f"expected a {self.kind.__name__} with {self.keys}")

    def paths(self, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """The path of each leaf."""
        if self.kind is None:
            return [prefix]
        names = getattr(self.kind, "_fields", self.keys)
        rows = zip(names, self.children, strict=True)
        return [p for name, child in rows for p in child.paths((*prefix, name))]
