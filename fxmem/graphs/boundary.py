"""The largest size that fits: whole numbers, and a peak that grows with them."""

from __future__ import annotations

from collections.abc import Callable

FARTHEST = 1 << 24
"""No larger size is looked for."""


def largest(
    peak: Callable[[int], int], budget: int, start: int, low: int = 1, high: int | None = None
) -> int | None:
    """The largest size from ``low`` to ``high`` whose peak is within the budget; None if there is none.

    Exact for a peak that never falls: the size after it was seen not to fit.  Peaks are nearly
    straight lines, so the next size to look at is where the line through the last two meets the
    budget; where that does not close in, the middle.
    """
    end = FARTHEST if high is None else min(high, FARTHEST)
    below, above = low - 1, end + 1  # the largest known to fit, the smallest known not to
    seen: list[tuple[int, int]] = []
    size = min(max(start, low), end)
    while above - below > 1:
        room = above - below
        seen.append((size, peak(size)))
        if seen[-1][1] <= budget:
            below = size
        else:
            above = size
        size = _next(seen, budget, below, above, halve=len(seen) > 2 and above - below > room // 2)
    return below if below >= low else None


def _next(seen: list[tuple[int, int]], budget: int, below: int, above: int, halve: bool) -> int:
    last, before = seen[-1], seen[-2] if len(seen) > 1 else None
    slope = 0.0
    if before is not None and before[0] != last[0]:
        slope = (last[1] - before[1]) / (last[0] - before[0])
    if halve and above <= FARTHEST:
        guess = (below + above) // 2
    elif slope > 0:
        guess = int(last[0] + (budget - last[1]) / slope)
        # From the side that is known, so that the second of two neighbours ends the search.
        guess = guess + 1 if guess == below else guess
    else:
        guess = 2 * last[0] if last[1] <= budget else last[0] // 2
    return min(max(guess, below + 1), above - 1)
