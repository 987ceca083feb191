"""Which indices of an axis belong to unit u, as a formula: exact where the index is regular, every
index by itself where it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stretch:
    """The indices `start + stride * a + inner * b + step * j` for `j < length`, where `a, b =
    divmod(u, period)`.
    """

    start: int
    stride: int
    inner: int
    step: int
    length: int


@dataclass(frozen=True)
class Rule:
    """Where the units of a group lie along one axis. `period` is 1 but for units that come in
    batches of so many; `listed` is the last resort.
    """

    period: int = 1
    stretches: tuple[Stretch, ...] = ()
    listed: tuple[tuple[int, ...], ...] = ()

    def of(self, unit: int) -> list[int]:
        """The indices of one unit, ascending."""
        if self.listed:
            return list(self.listed[unit])
        a, b = divmod(unit, self.period)
        return sorted(
            s.start + s.stride * a + s.inner * b + s.step * j
            for s in self.stretches
            for j in range(s.length)
        )


def rule_of(index: Tensor) -> Rule:
    """The rule of an index `(U, width)`, ascending in each row: for single units, else for the
    shortest batches of units that repeat.
    """
    units = len(index)
    for period in [1, *(p for p in range(2, units) if units % p == 0)]:
        batches = index.view(units // period, period, -1)
        inner = _differences(batches, 1)
        outer = _differences(batches, 0)
        if inner is not None and outer is not None:
            return Rule(
                period, tuple(_stretches(index[0].tolist(), outer.tolist(), inner.tolist()))
            )
    return Rule(listed=tuple(map(tuple, index.tolist())))


def _differences(batches: Tensor, dim: int) -> Tensor | None:
    """What each column grows by along `dim`, zeros where there is one entry only; None where it
    does not grow evenly.
    """
    if batches.shape[dim] < 2:
        return torch.zeros(batches.shape[2], dtype=torch.int64)
    grown = batches.diff(dim=dim)
    first = grown[0, 0]
    return first if bool((grown == first).all()) else None


def _stretches(starts: list[int], outer: list[int], inner: list[int]) -> list[Stretch]:
    """Neighbouring columns that grow alike and lie evenly, as one."""
    out: list[Stretch] = []
    for at, stride, within in zip(starts, outer, inner, strict=True):
        last = out[-1] if out else None
        if (
            last
            and (last.stride, last.inner) == (stride, within)
            and (last.length == 1 or at == last.start + last.step * last.length)
        ):
            out[-1] = Stretch(
                last.start,
                stride,
                within,
                at - last.start if last.length == 1 else last.step,
                last.length + 1,
            )
        else:
            out.append(Stretch(at, stride, within, 1, 1))
    return out


def in_words(rule: Rule) -> str:
    """`u`, `192u..192u+191`, `8u..8u+7 and the same +48, +96`, `u+16j, j<4`; a rule without a
    formula shows its first unit.
    """
    if rule.listed:
        few = ", ".join(map(str, rule.listed[0][:4])) + (", ..." if len(rule.listed[0]) > 4 else "")
        return f"no formula; unit 0: {few}"
    first, *rest = rule.stretches
    if rest and all(
        (s.stride, s.inner, s.step, s.length)
        == (first.stride, first.inner, first.step, first.length)
        for s in rest
    ):
        gaps = [s.start - first.start for s in rest]
        more = ", ".join(f"+{g}" for g in gaps[:4]) + (
            f", ... +{gaps[-1]}" if len(gaps) > 4 else ""
        )
        text = f"{_in_words(first, rule.period)} and the same {more}"
    else:
        text = ", ".join(_in_words(s, rule.period) for s in rule.stretches[:4]) + (
            f", ... ({len(rule.stretches)} stretches)" if len(rest) > 3 else ""
        )
    return text if rule.period == 1 else f"{text}; a, b = divmod(u, {rule.period})"


def _in_words(s: Stretch, period: int) -> str:
    variables = [(s.stride, "u")] if period == 1 else [(s.stride, "a"), (s.inner, "b")]
    first = _sum(variables, s.start)
    if s.length == 1:
        return first
    if s.step == 1:
        return f"{first}..{_sum(variables, s.start + s.length - 1)}"
    if s.length <= 3:
        return ", ".join(_sum(variables, s.start + s.step * j) for j in range(s.length))
    return f"{first}+{s.step}j, j<{s.length}"


def _sum(variables: list[tuple[int, str]], constant: int) -> str:
    terms = [("" if n == 1 else str(n)) + letter for n, letter in variables if n]
    return "+".join(terms + ([str(constant)] if constant or not terms else []))


def as_data(rule: Rule) -> dict[str, Any]:
    """The rule for JSON: a list of stretches, with the names of the formula; or all indices, unit
    by unit.
    """
    if rule.listed:
        return {"units": [list(row) for row in rule.listed]}
    named = [
        {"start": s.start, "stride": s.stride, "step": s.step, "length": s.length}
        for s in rule.stretches
    ]
    if rule.period == 1:
        return {"stretches": named}
    return {
        "period": rule.period,
        "stretches": [n | {"inner": s.inner} for n, s in zip(named, rule.stretches, strict=True)],
    }
