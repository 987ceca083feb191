"""The config from which transformers' own class builds a model of given sizes, the same for all
layers: searched by editing fields.

Values are proposed from the ratio between the sizes that a config gives and the sizes that are
wanted; what the class then builds is compared, tensor by tensor and number by number.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from prunekit.checkpoint.class_sizes import Rows, edited, integers, rows_of_config


class Fit:
    """A config on its way to the wanted rows: edits so far, which rows are still wrong, and which
    fields do nothing.

    `wrong` counts (rows that must be right, integers that have the value of before the edits): the
    second kind are leftovers of removal, or a sign that another field should have been edited.
    """

    def __init__(
        self, kind: type, config: Any, target: Rows, prefix: str = "", inert: set[str] | None = None
    ):
        self.kind, self.config, self.prefix = kind, config, prefix
        self.target = {k: v for k, v in target.items() if k[0].startswith(prefix)}
        self.edits: dict[str, int] = {}
        self.inert = set(inert or ())
        self.rows = self.before = self._rows_of(config) or {}
        self.wrong = self._wrong(self.rows)

    def _rows_of(self, config: Any | None) -> Rows | None:
        found = rows_of_config(self.kind, config)
        if found is None:
            return None
        return {k: v for k, v in found.items() if k[0].startswith(self.prefix)}

    def _wrong(self, found: Rows) -> tuple[int, int]:
        far = [k for k, v in self.target.items() if found.get(k) != v]
        leftover = sum(
            type(k[1]) is str
            and type(self.target[k]) is int
            and self.before.get(k) == self.target[k]
            for k in far
        )
        return len(far) - leftover + sum(k not in self.target for k in found), leftover

    def ratios(self, rows: Rows, keys: Iterable[tuple[str, int | str]]) -> list[Fraction]:
        """Wanted size over that in `rows`, of some of them, the most frequent ratios first."""
        pairs: Counter[Fraction] = Counter()
        for key in keys:
            want, have = self.target[key], rows.get(key)
            if type(want) is int and type(have) is int and want > 0 and have > 0 and want != have:
                pairs[Fraction(want, have)] += 1
        return [ratio for ratio, _ in pairs.most_common(4)]

    def proposals(
        self, config: Any = None, ratios: Sequence[Fraction] | None = None
    ) -> Iterator[tuple[str, int]]:
        """Fields and values worth asking for, of the config and the ratios now or of others."""
        text = (config or self.config).get_text_config()
        if ratios is None:
            ratios = self.ratios(self.rows, self.target)
        fields = integers(text, parts=not self.prefix)
        sizes = {v for (_, k), v in self.target.items() if k == ".head_dim"}
        if "head_dim" not in fields and sizes:
            fields["head_dim"] = 0  # many classes read it where their config does not declare it
        for field, value in fields.items():
            if field in self.inert:
                continue
            wanted = (
                sizes
                if field == "head_dim"
                else {int(value * r) for r in ratios if (value * r).denominator == 1}
            )
            yield from ((field, v) for v in sorted(wanted, reverse=True) if v != value)

    def attempt(self, edits: dict[str, int]) -> tuple[tuple[int, int], Any, Rows] | None:
        """How many rows would be wrong after more edits; None where the class refuses them."""
        config = edited(self.config, **edits)
        found = self._rows_of(config)
        if found is None:
            return None
        if found == self.rows and len(edits) == 1:
            self.inert |= set(edits)
        return self._wrong(found), config, found

    def take_best(self, choices: Iterable[dict[str, int]]) -> bool:
        """Take the choice that leaves the fewest rows wrong, if that is fewer than now."""
        won: tuple[tuple[int, int], Any, Rows] | None = None
        taken: dict[str, int] = {}
        for edits in choices:
            result = self.attempt(edits)
            if result is not None and result[0] < (won[0] if won else self.wrong):
                won, taken = result, edits
            if won is not None and won[0] == (0, 0):
                break
        if won is None:
            return False
        self.wrong, self.config, self.rows = won
        self.edits |= taken
        return True

    def followed(self) -> Iterator[dict[str, int]]:
        """A field that makes rows right with a second one that rights what the first makes wrong:
        where a size is the product of both (shared experts as multiples of a routed one).
        """
        right = {k for k, v in self.target.items() if self.rows.get(k) == v}
        for field, value in list(self.proposals()):
            result = self.attempt({field: value})
            if result is None:
                continue
            _, config, found = result
            now = {k for k, v in self.target.items() if found.get(k) == v}
            if now <= right:
                continue
            for other, v in self.proposals(config, self.ratios(found, right - now)):
                if other != field:
                    yield {field: value, other: v}

    def run(self) -> Fit:
        """Edit one field at a time while that helps, then two at a time where only both together
        are accepted, or where the second takes back what the first has done elsewhere.
        """
        while self.wrong != (0, 0):
            if self.take_best({f: v} for f, v in self.proposals()):
                continue
            live = [{f: v} for f, v in self.proposals()][:12]
            pairs = itertools.combinations(live, 2)
            if self.take_best(a | b for a, b in pairs if a.keys() != b.keys()):
                continue
            if not self.take_best(self.followed()):
                break
        return self


def fit(kind: type, config: Any, target: Rows) -> Fit:
    """The config nearest to the wanted rows that the class accepts, the same for all layers."""
    return Fit(kind, config, target).run()
