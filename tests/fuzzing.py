"""How much the fuzzers try: a little by default, `PRUNEKIT_FUZZ=500` examples where somebody asks;
and what both draw from.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ASKED = int(os.environ.get("PRUNEKIT_FUZZ", "0"))


def examples(few: int) -> settings:
    """The same examples in every run, unless more are asked for."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=ASKED or few,
        derandomize=not ASKED,
        deadline=None,
        suppress_health_check=checks,
        database=None,
    )


EDGES = [0, 1, -1, 2, 3, 7, 2**31, 2**62, 2**64, 10**400, True, False, None]
EDGES += [0.0, 0.5, 1.0, -0.1, 1e308, float("nan"), float("inf"), -float("inf")]
EDGES += ["", "none", "all", "null", "a" * 300, "../../x", "\0", "\ud800", "é", "1", "on"]
WORDS = (
    "2:4 4:8 N:8 auto row matrix alpha units parameters prunable local global kept removed stock"
)
WORDS = WORDS.split() + "disk bfloat16 bf16 fast dense own squared nearest mean max text".split()
WORDS += "pydocs c4 train test each q_proj mlp.* heads neurons hidden blocks experts inner".split()
"""What options that take words mean somewhere."""

values: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from(EDGES) | st.integers(-5, 200) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)
"""Whatever a YAML or JSON file can hold."""


def like(value: Any) -> st.SearchStrategy[Any]:
    """Other values of the same type, which get further than those of another."""
    if isinstance(value, bool):
        return st.sampled_from([True, False, None])
    if value is None:
        return st.sampled_from([None, True, 0, 1, 2, 3, 0.5, *WORDS, [0, 1], [1, 3], ["heads"]])
    if isinstance(value, str):
        return st.sampled_from(WORDS)
    if isinstance(value, int):
        return st.integers(value - 3, value + 3) | st.integers(-2, 4 * abs(value) + 8)
    if isinstance(value, float):
        return st.sampled_from([0.0, -value, value / 2, value * 2, value * 1e6]) | st.floats(0, 1)
    if isinstance(value, list) and value:
        return st.lists(st.sampled_from(value), max_size=len(value) + 1)
    return st.just(value)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises TimeoutError inside where it takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every value in a tree of dicts and lists, inner nodes included."""
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


def at(node: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for step in path:
        node = node[step]
    return node


def put(node: Any, path: tuple[Any, ...], value: Any) -> None:
    """Sets the value at a path."""
    at(node, path[:-1])[path[-1]] = value
