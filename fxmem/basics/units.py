"""Bytes as people write them: "20GiB" to an int, and an int to "20.00 GiB"."""

from __future__ import annotations

import re
from fractions import Fraction

from fxmem.basics.errors import BudgetError

_BINARY = {f"{letter}iB": 1024**power for power, letter in enumerate("KMGTP", start=1)}
_DECIMAL = {f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", start=1)}
# kB is how SI itself spells the thousand, so it joins the list.
_EXACT = {"B": 1, "kB": 1000, **_DECIMAL, **_BINARY}
BYTES_PER_UNIT = {**_EXACT, **{unit.lower(): nbytes for unit, nbytes in _EXACT.items()}}

# Up to 30 digits: enough for any memory, short enough that hostile text costs nothing.
NUMBER = r"(?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})"
_BYTES = re.compile(rf"({NUMBER}) *([A-Za-z]*)")


def parse_bytes(text: str) -> int:
    """The bytes that ``text`` names: "20GiB" is 20·2^30, "20GB" is 20·10^9, "512B" is 512.

    Decimals and spaces are read ("1.5 GiB"), fractions of a byte are dropped. Units are spelled
    as here or all in lower case; "Gb" is a gigabit elsewhere and is refused, as is a bare number.
    Raises BudgetError, which says what was read and the likely meaning.
    """
    match = _BYTES.fullmatch(text.strip(" "))
    if match is None:
        raise BudgetError(f"cannot read {shown(text)} as bytes: {_why_not(text)}")
    number, unit = match.groups()
    if unit not in BYTES_PER_UNIT:
        raise BudgetError(f"cannot read {shown(text)} as bytes: {_about_unit(number, unit)}")
    return int(Fraction(number) * BYTES_PER_UNIT[unit])


def format_bytes(nbytes: int) -> str:
    """``nbytes`` in the largest binary unit that it fills: "512 B", "3.2 MiB", "21.56 GiB".

    Two decimals from GiB up, so that 10 MiB still show; below it one, at most four digits.
    """
    sign, nbytes = ("-", -nbytes) if nbytes < 0 else ("", nbytes)
    if nbytes < 1024:
        return f"{sign}{nbytes} B"
    for unit, scale in _BINARY.items():
        number = _digits(nbytes / scale, unit)
        # Rounding may fill the unit up: 1023.99 MiB reads as 1.00 GiB.
        if float(number) < 1024 or unit == "PiB":
            break
    return f"{sign}{number} {unit}"


def shown(value: object) -> str:
    """``value`` for an error message: its repr, cut where it would flood the screen."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _digits(number: float, unit: str) -> str:
    if unit not in ("KiB", "MiB"):
        return f"{number:.2f}"
    return f"{number:.1f}" if number < 999.95 else f"{number:.0f}"


def _why_not(text: str) -> str:
    if not text.strip():
        return "it is empty"
    if text.strip().startswith("-"):
        return "it is negative"
    return "it is not a number followed by a unit"


def _about_unit(number: str, unit: str) -> str:
    if not unit:
        return f'it has no unit; did you mean "{number}GiB"?'
    letter = unit[0].upper()
    if letter not in "KMGTP":
        return f'there is no unit "{unit}"; did you mean "{number}GiB"?'
    likely = f'"{number}{letter}iB" (powers of 1024) or "{number}{letter}B" (powers of 1000)'
    return f'there is no unit "{unit}"; did you mean {likely}?'
