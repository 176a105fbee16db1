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


@dataclass(frozen=True)
class Allotment:
    """An encoding for each candidate.

    ceiling: share of the minibatch's variance that the codes which are kept may add.  drawn: by
    parameter, the variance that some codes were seen to add, all together; for plans that keep these.
    """

    statistics: Statistics = field(repr=False)
    ceiling: float
    candidates: tuple[Candidate, ...] = field(repr=False)
    encodings: tuple[str, ...]
    drawn: Mapping[str, float] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, statistics: Statistics, ceiling: float, candidates: Iterable[Candidate]
    ) -> Allotment:
        """What may be kept all at once."""
        candidates = tuple(candidates)
        finest = tuple(c.choices[0][0] for c in candidates)
        return cls(statistics, ceiling, candidates, finest).among({c.source for c in candidates})

    def among(self, kept: Collection[str]) -> Allotment:
        """The same when only the codes of these sources will be kept; others stay out."""
        candidates = [c for c in self.candidates if c.source in kept]
        levels = [0] * len(candidates)
        left = self.ceiling - sum(self._share(c, 0) for c in candidates)
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
            more = self._share(candidates[n], levels[n] + 1) - self._share(candidates[n], levels[n])
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

    def staying(self) -> Allotment:
        """Anew, with the codes alone whose noise stays in one gradient."""
        staying = [c for c in self.candidates if c.sensitivity.use is Use.LINEAR]
        return Allotment.of(self.statistics, self.ceiling, staying)

    def confirmed(self, drawn: Mapping[str, float], backwards: int) -> Allotment:
        """With what its codes were seen to add, which took so many backwards."""
        known = replace(self.statistics, backwards=self.statistics.backwards + backwards)
        return replace(self, statistics=known, drawn=drawn)

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

    def _share(self, candidate: Candidate, level: int) -> float:
        variance = candidate.sensitivity.variance(candidate.choices[level][0])
        return self.statistics.share(variance)

    def _gain(self, candidate: Candidate, level: int) -> float:
        """Bytes that the next step saves, a share of the noise that it adds."""
        saved = candidate.choices[level][1] - candidate.choices[level + 1][1]
        more = self._share(candidate, level + 1) - self._share(candidate, level)
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
        share = self.share(source)
        if not share <= self.ceiling:
            return NOISE_CEILING + 1
        return max(1, math.ceil(share / self.ceiling * NOISE_CEILING)) if share else 1

    def by_parameter(self, kept: Collection[str]) -> Iterator[tuple[str, float, float]]:
        """Parameter, the variance that the kept codes add to its gradient, and its own."""
        added: dict[str, float] = defaultdict(float, self.drawn or {})
        for source, (candidate, name) in self.chosen.items():
            if source in kept and self.drawn is None:
                for parameter, variance in candidate.sensitivity.variances[name].items():
                    added[parameter] += variance
        for parameter, own in self.statistics.minibatch.items():
            yield parameter, added.get(parameter, 0.0), own


def candidates_of(statistics: Statistics, graph: JointGraph) -> Iterator[Candidate]:
    """What may be a code, each with a stream of random numbers of its own."""
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
