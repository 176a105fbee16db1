"""Bytes as text, both ways."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmem.basics.errors import BudgetError
from fxmem.basics.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("20GiB", 20 * 2**30),
        ("20GB", 20 * 10**9),
        ("512MiB", 512 * 2**20),
        ("512MB", 512 * 10**6),
        ("7KiB", 7 * 1024),
        ("7KB", 7000),
        ("7kB", 7000),
        ("2TiB", 2 * 2**40),
        ("1PB", 10**15),
        ("512B", 512),
        ("20gib", 20 * 2**30),
        ("20gb", 20 * 10**9),
        (" 1.5 GiB ", 3 * 2**29),
        (".5KiB", 512),
        ("1.KiB", 1024),
        ("0.1KB", 100),
        ("1.0019KB", 1001),
        ("0B", 0),
    ],
)
def test_units_are_read(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("20", 'no unit; did you mean "20GiB"'),
        ("20G", '"20GiB" (powers of 1024) or "20GB" (powers of 1000)'),
        ("20Gi", '"20GiB"'),
        ("20Gb", 'no unit "Gb"'),
        ("20m", '"20MiB"'),
        ("20 gigs", 'no unit "gigs"; did you mean "20GiB"'),
        ("20 bytes", 'no unit "bytes"'),
        ("", "empty"),
        ("  ", "empty"),
        ("-1GiB", "negative"),
        ("GiB", "not a number followed by a unit"),
        ("1,000MB", "not a number"),
        ("1e9B", "not a number"),
        ("0x10", "there is no unit|not a number"),
        ("1.2.3GiB", "not a number"),
        ("٢GiB", "not a number"),
        ("20GiB\n", "not a number"),
        ("9" * 10_000 + "GiB", "not a number"),
    ],
)
def test_other_text_is_refused_with_what_was_read(text, says):
    with pytest.raises(BudgetError) as caught:
        parse_bytes(text)
    message = str(caught.value)
    assert message.startswith("cannot read ")
    assert any(part in message for part in says.split("|"))
    assert len(message) < 300


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3355443, "3.2 MiB"),
        (1000 * 2**20, "1000 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (20 * 2**30, "20.00 GiB"),
        (23149873725, "21.56 GiB"),
        (3 * 2**40, "3.00 TiB"),
        (5000 * 2**50, "5000.00 PiB"),
        (-512, "-512 B"),
        (-3355443, "-3.2 MiB"),
    ],
)
def test_bytes_are_written_in_the_unit_that_they_fill(nbytes, text):
    assert format_bytes(nbytes) == text


@given(st.integers(0, 2**60))
def test_what_is_written_is_read_back_within_its_rounding(nbytes):
    assert parse_bytes(format_bytes(nbytes)) == pytest.approx(nbytes, rel=0.05)
