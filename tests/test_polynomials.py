"""Which of many polynomials can be the largest, and where: never one too few."""

import random

import sympy

from fxmem.basics.polynomials import Monomials, reigns, terms, undominated
from fxmem.graphs.boundary import largest

B, S = sympy.symbols("B S", integer=True, positive=True)


def kept(rows, ranges):
    monomials = Monomials()
    numbers = [monomials.row(row) for row in rows]
    return undominated(monomials.matrix(numbers), monomials, ranges)


def test_terms_are_whole_numbers_of_monomials():
    assert dict(terms(3 * B * (S + 2))) == {B * S: 3, B: 6}
    assert terms(B / 2) == ((B / 2, 1),)
    assert terms(0) == ()


def test_a_smaller_one_goes_and_a_steeper_one_stays():
    assert kept([B + 10, B + 5, 3 * B], {B: (2, None)}) == [0, 2]
    # From 2 on, 3*B is at least 6.
    assert kept([B + 4, 3 * B], {B: (2, None)}) == [1]


def test_an_end_of_the_range_decides():
    assert sorted(kept([B**2, 100 * B], {B: (2, None)})) == [0, 1]
    assert kept([B**2, 100 * B], {B: (2, 100)}) == [1]


def test_what_a_mixture_of_two_others_covers_goes():
    assert sorted(kept([2 * B + 100, 10 * B + 20, 6 * B + 60], {B: (2, None)})) == [0, 1]


def test_an_expression_of_unknown_sign_proves_nothing():
    odd = sympy.Function("odd")(B)
    assert sorted(kept([B + odd, B], {B: (2, None)})) == [0, 1]


def test_many_rounded_sizes_take_no_longer_than_they_are_many():
    # Blocks of an allocator: each rounded size is a variable, and 2^60 products of them do not occur.
    blocks = [512 * sympy.ceiling(B * n / 512) for n in range(1, 121, 2)]
    rows = [sum(blocks[: i + 1]) + 4 * B for i in range(len(blocks))]
    assert kept(rows, {B: (2, None)}) == [len(rows) - 1]


def test_nothing_that_is_largest_somewhere_is_lost():
    rng = random.Random(0)
    for _ in range(60):
        rows = [
            sum(rng.choice((0, 0, rng.randint(0, 50))) * m for m in (B * S**2, B * S, S, B, 1))
            for _ in range(12)
        ]
        high = rng.choice((None, 40))
        found = kept([sympy.sympify(r) for r in rows], {B: (2, high), S: (2, None)})
        for _ in range(40):
            at = {B: rng.randint(2, high or 200), S: rng.choice((2, 3, 10, 100, 5000))}
            values = [int(sympy.sympify(r).subs(at)) for r in rows]
            assert max(values) == max(values[i] for i in found)


def test_reigns_meet_where_lines_cross():
    assert reigns([B + 10, 3 * B], B, 2, None) == [[(2, 5)], [(6, None)]]
    assert reigns([100 * B, B**2], B, 2, 1000) == [[(2, 100)], [(101, 1000)]]
    assert reigns([B, 2 * B], B, 2, 9) == [[], [(2, 9)]]


class Line:
    """A peak that grows with the size, and how often it was asked for."""

    def __init__(self, *coefficients):
        self.coefficients = coefficients
        self.asked = 0

    def __call__(self, size):
        self.asked += 1
        return sum(c * size**i for i, c in enumerate(self.coefficients))


def test_the_largest_is_exact_and_found_in_few_steps():
    rng = random.Random(0)
    for _ in range(300):
        curve = rng.choice((0, rng.randint(0, 99)))
        peak = Line(rng.randint(0, 10**9), rng.randint(1, 10**6), curve)
        size = rng.randint(1, 4000)
        budget = peak(size) + rng.randint(0, peak.coefficients[1] - 1)
        assert largest(peak, budget, rng.randint(1, 64)) == size
        assert peak.asked < 30


def test_where_nothing_or_everything_fits():
    assert largest(Line(100, 10), 50, 4) is None
    assert largest(Line(0, 1), 50, 4, high=20) == 20
