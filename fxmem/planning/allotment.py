"""How the noise that a plan may add is shared out among codes: coarse where that is cheap.

Each candidate starts with its finest encoding.  Steps to coarser ones are taken, most bytes saved for
their noise first, as long as all of it stays below the ceiling; that is water-filling over bits, for the
noise of an encoding grows about sixteenfold where its bits are halved.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from fxmem.analysis.dataflow import NOISE_CEILING
from fxmem.basics.errors import PlanMismatchError
from fxmem.basics.sizes import hint
from fxmem.codes.gradient_noise import Sensitivity, Statistics
from fxmem.codes.lossless import ELEMENTS
from fxmem.codes.lossy import LossyEncoding, all_encodings
from fxmem.graphs.consumers import Use
from fxmem.graphs.graph import JointGraph
from fxmem.planning.plan import NoiseOf, relative_error


def encoding_named(name: str) -> LossyEncoding:
    return next(encoding for encoding in all_encodings() if encoding.name == name)


@dataclass(frozen=True)
class Candidate:
    """A saved value that may be a code.  choices: encodings and the bytes of each, finest first."""

    sensitivity: Sensitivity
    stream: int
    choices: tuple[tuple[str, int], ...]

    @property
    def source(self) -> str:
        return self.sensitivity.source

    @property
    def is_biased(self) -> bool:
        """Is the mean of gradients another with noise in it?"""
        return self.sensitivity.use is Use.SMOOTH


@dataclass(frozen=True)
class Allotment:
    """An encoding for each candidate.

    ceiling: share of the minibatch's variance that the codes which are kept may add.  bounded: share of
    the gradient's length that those of them may come to which do not keep its mean.  drawn: by parameter,
    the variance that some codes were seen to add, all together; for plans that keep these.  moved: the same
    of those alone that do not keep the mean.  tightened: share of their room that they may take.
    """

    statistics: Statistics = field(repr=False)
    ceiling: float
    candidates: tuple[Candidate, ...] = field(repr=False)
    encodings: tuple[str, ...]
    drawn: Mapping[str, float] | None = field(default=None, repr=False)
    bounded: float = 0.0
    moved: Mapping[str, float] | None = field(default=None, repr=False)
    tightened: float = 1.0

    @classmethod
    def of(
        cls,
        statistics: Statistics,
        ceiling: float,
        candidates: Iterable[Candidate],
        bounded: float = 0.0,
    ) -> Allotment:
        """What may be kept all at once."""
        return cls(statistics, ceiling, tuple(candidates), (), bounded=bounded).anew()

    def anew(self) -> Allotment:
        """The same of all candidates, as if nothing had been chosen or seen."""
        candidates = tuple(c for c in self.candidates if self.bounded or not c.is_biased)
        whole = replace(self, candidates=candidates, encodings=(), drawn=None, moved=None)
        return whole.among({c.source for c in candidates})

    def among(self, kept: Collection[str]) -> Allotment:
        """The same when only the codes of these sources will be kept; others stay out."""
        candidates = [c for c in self.candidates if c.source in kept]
        levels = [0] * len(candidates)
        left = self.ceiling - sum(self._cost(c, 0) for c in candidates)
        refused: set[int] = set()
        while True:
            steps = [
                (self._gain(c, levels[n]), -n)
                for n, c in enumerate(candidates)
                if n not in refused and levels[n] + 1 < len(c.choices)
            ]
            if not steps:
                break
            n = -max(steps)[1]
            more = self._cost(candidates[n], levels[n] + 1) - self._cost(candidates[n], levels[n])
            if more > left:
                refused.add(n)
                continue
            left -= more
            levels[n] += 1
        names = tuple(c.choices[level][0] for c, level in zip(candidates, levels, strict=True))
        return replace(self, candidates=tuple(candidates), encodings=names)

    def travels(self, kept: Collection[str]) -> bool:
        """Does noise of any of these sources reach gradients upstream?"""
        return any(self.chosen[source][0].sensitivity.use is not Use.LINEAR for source in kept)

    def biased(self, kept: Collection[str]) -> frozenset[str]:
        """Those of these sources whose codes move the mean of gradients."""
        return frozenset(source for source in kept if self.chosen[source][0].is_biased)

    def harmless(self, candidates: Collection[Candidate]) -> Allotment:
        """Anew, with less than all of these.

        Where means moved too far, with less of what moves them, once, and then without; else with what
        stays in one gradient.
        """
        if self.drawn is None:
            less = sum((self.moved or {}).values()) / self._room / self._farthest() ** 2
            tighter = replace(self, candidates=tuple(candidates), tightened=less)
            return (tighter if self.tightened == 1 else replace(tighter, bounded=0.0)).anew()
        staying = [c for c in candidates if c.sensitivity.use is Use.LINEAR]
        return Allotment.of(self.statistics, self.ceiling, staying)

    def is_allowed(self, margin: float) -> bool:
        """Is what was seen no more than may be?  margin: times the ceiling that few draws may come to."""
        added = sum((self.drawn or {}).values())
        if self.statistics.share(added) > margin * self.ceiling:
            return False
        return self.moved is None or self._farthest() <= self.bounded

    def _farthest(self) -> float:
        """How far the mean gradient of any group of parameters moves, as a share of its length."""
        moved: dict[str, float] = defaultdict(float)
        squares: dict[str, float] = defaultdict(float)
        for parameter, square in self.statistics.squares.items():
            moved[NoiseOf.group_of(parameter)] += (self.moved or {}).get(parameter, 0.0)
            squares[NoiseOf.group_of(parameter)] += square
        return max((relative_error(moved[g], squares[g]) for g in squares), default=0.0)

    def given(self, wanted: Mapping[str, str]) -> Allotment:
        """These encodings, by source.  Raises ``PlanMismatchError`` for what may not be encoded so."""
        known = {c.source: c for c in self.candidates}
        for source, name in wanted.items():
            if source not in known or name not in dict(known[source].choices):
                raise PlanMismatchError(
                    f"the plan stores {source or 'a value that this step lacks'} as {name}, which "
                    "would make its gradients wrong, or nobody knows how much"
                )
        candidates = tuple(c for c in self.candidates if c.source in wanted)
        names = tuple(wanted[c.source] for c in candidates)
        return replace(self, candidates=candidates, encodings=names)

    def finer(self, source: str) -> tuple[tuple[str, int], ...]:
        """The encodings finer than the one chosen, and their bytes, the finest first."""
        candidate, name = self.chosen[source]
        names = [choice for choice, _ in candidate.choices]
        return candidate.choices[: names.index(name)]

    def with_code(self, source: str, name: str) -> Allotment:
        """The same with another encoding of one source."""
        pairs = zip(self.candidates, self.encodings, strict=True)
        return replace(self, encodings=tuple(name if c.source == source else n for c, n in pairs))

    def _cost(self, candidate: Candidate, level: int) -> float:
        return self._cost_of(candidate, candidate.choices[level][0])

    def _cost_of(self, candidate: Candidate, name: str) -> float:
        """What a code takes of the ceiling: a share of the minibatch's variance.

        Of one that moves the mean, as much as it takes of what those may come to, if that is more.
        """
        variance = candidate.sensitivity.variance(name)
        share = self.statistics.share(variance)
        if not candidate.is_biased:
            return share
        room = self.tightened * self.bounded**2 * self._room
        return max(share, self.ceiling * variance / room if room else math.inf)

    @property
    def _room(self) -> float:
        """Half the square of the gradient's length, for groups of parameters are not all hit alike."""
        return sum(self.statistics.squares.values()) / 2

    def _gain(self, candidate: Candidate, level: int) -> float:
        """Bytes that the next step saves, a share of the noise that it adds."""
        saved = candidate.choices[level][1] - candidate.choices[level + 1][1]
        more = self._cost(candidate, level + 1) - self._cost(candidate, level)
        return saved / more if more > 0 else math.inf

    # -- What an allotment says ------------------------------------------------------------------------

    @cached_property
    def chosen(self) -> dict[str, tuple[Candidate, str]]:
        """Source -> the candidate and the name of its encoding."""
        pairs = zip(self.candidates, self.encodings, strict=True)
        return {c.source: (c, name) for c, name in pairs}

    def share(self, source: str) -> float:
        """What the code of a source adds, as a share of the minibatch's variance."""
        candidate, name = self.chosen[source]
        return self.statistics.share(candidate.sensitivity.variance(name))

    def units(self, source: str) -> int:
        """The same as whole ``NOISE_CEILING``-ths of the ceiling, rounded up: one at least."""
        cost = self._cost_of(*self.chosen[source])
        if not cost <= self.ceiling:
            return NOISE_CEILING + 1
        return max(1, math.ceil(cost / self.ceiling * NOISE_CEILING)) if cost else 1

    def by_parameter(self, kept: Collection[str]) -> Iterator[tuple[str, tuple[float, ...]]]:
        """Parameter, and as ``NoiseOf``: added by the kept codes, own, moved and square."""
        added: dict[str, float] = defaultdict(float, self.drawn or {})
        for source, (candidate, name) in self.chosen.items():
            if source in kept and self.drawn is None:
                for parameter, variance in candidate.sensitivity.variances[name].items():
                    added[parameter] += variance
        for parameter, own in self.statistics.minibatch.items():
            square = self.statistics.squares.get(parameter, 0.0)
            moved = (self.moved or {}).get(parameter, 0.0)
            yield parameter, (added.get(parameter, 0.0), own, moved, square)


def candidates_of(statistics: Statistics, graph: JointGraph) -> Iterator[Candidate]:
    """What may be a code, each with a stream of random numbers of its own.

    Nothing where the example's gradients do not differ from part to part, or are no numbers: whatever
    codes add there says nothing about other batches.
    """
    if not 0 < statistics.variance < math.inf:
        return
    nodes = {node.name: node for node in graph.nodes}
    for stream, found in enumerate(statistics.sensitivities):
        value = nodes[found.source].meta["val"]
        n = hint(value.numel())
        sizes = [
            (name, int(encoding_named(name).nbytes.subs(ELEMENTS, n))) for name in found.variances
        ]
        choices = tuple(_finest_first(found, sizes, n * value.element_size()))
        if choices:
            yield Candidate(found, stream, choices)


def _finest_first(
    found: Sensitivity, sizes: Iterable[tuple[str, int]], most: int
) -> Iterator[tuple[str, int]]:
    """Encodings of fewer than ``most`` bytes, without those that are larger and noisier than another."""
    noise = math.inf
    kept = []
    for name, size in sorted(sizes, key=lambda one: (one[1], found.variance(one[0]))):
        if size < most and found.variance(name) < noise:
            noise = found.variance(name)
            kept.append((name, size))
    yield from reversed(kept)
