"""Quantities with units, read from a shell and written for people; inside, everything is SI.

Decimal prefixes count in thousands (1 Gbit = 10^9 bit, 1 MB = 10^6 B), as network equipment is labelled.
"""

from __future__ import annotations

import re

from descompiler.errors import InputError

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


_BINARY = {"ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}


_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "µs": 1e6, "μs": 1e6, "ns": 1e9}  # micro sign, and Greek mu


MOST_RANKS, MOST_ROWS = 1 << 18, 1 << 32
"""Ranks, and rows of one rank, that anything is planned for: bytes are counted in 64 bits."""


_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?|\.[0-9]+)\s*([^\s0-9]*)\s*", re.IGNORECASE)


def _split(text: str, what: str, example: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise InputError(f"{text!r} is no {what}: give a number and a unit, such as {example}")
    return float(match[1]), match[2]


def parse_bandwidth(text: str) -> float:
    """Bytes per second of a bandwidth in bits or bytes per second.

    >>> parse_bandwidth("25Gbit"), parse_bandwidth("100 Mbit/s"), parse_bandwidth("3GB/s")
    (3125000000.0, 12500000.0, 3000000000.0)
    """
    number, unit = _split(text, "bandwidth", "25Gbit or 3GB/s")
    unit = re.sub(r"(/s|ps)$", "", unit)
    for suffix, scale in (("bit", 1 / 8), ("b", 1 / 8), ("B", 1.0)):
        prefix = unit[: -len(suffix)].lower()
        if unit.endswith(suffix) and prefix in _PREFIXES:
            result = number * _PREFIXES[prefix] * scale
            if result <= 0:
                raise InputError(f"{text!r}: a bandwidth is more than 0")
            return result
    raise InputError(f"{text!r} is no bandwidth: the unit is kbit, Mbit, Gbit, Tbit, MB/s or GB/s, as in 25Gbit")


def parse_time(text: str) -> float:
    """Seconds.

    >>> parse_time("20us"), parse_time("1.5 ms")
    (2e-05, 0.0015)
    """
    number, unit = _split(text, "time", "20us")
    if unit not in _PER_SECOND:
        raise InputError(f"{text!r} is no time: the unit is s, ms, us or ns, as in 20us")
    return number / _PER_SECOND[unit]


def parse_size(text: str) -> int:
    """Bytes.

    >>> parse_size("16GB"), parse_size("16GiB")
    (16000000000, 17179869184)
    """
    number, unit = _split(text, "size", "16GB or 16GiB")
    prefix = unit[:-1].lower()
    if not unit.endswith("B") or prefix not in {**_PREFIXES, **_BINARY}:
        raise InputError(f"{text!r} is no size: the unit is B, kB, MB, GB, TB or KiB, MiB, GiB, TiB, as in 16GB")
    return round(number * {**_PREFIXES, **_BINARY}[prefix])


def parse_counts(text: str, what: str = "ranks") -> tuple[int, ...]:
    """A number, a list of numbers, or the powers of two from a first to a last, which are both included.

    >>> parse_counts("8"), parse_counts("2,4,6"), parse_counts("2:64"), parse_counts("3:20")
    ((8,), (2, 4, 6), (2, 4, 8, 16, 32, 64), (3, 4, 8, 16, 20))
    """
    try:
        if ":" in text:
            first, last = (int(x) for x in text.split(":"))
            if not 0 < first <= last:
                raise ValueError
            powers = (1 << e for e in range(first.bit_length(), last.bit_length()))
            result = tuple(sorted({first, *(p for p in powers if p < last), last}))
        else:
            result = tuple(int(x) for x in text.split(","))
        if min(result) < 1:
            raise ValueError
    except ValueError:
        raise InputError(
            f"{text!r} is no number of {what}: give one (8), a list (2,4,6) or first:last (2:256, powers of two)"
        ) from None
    return _at_most(result, text, what)


def _at_most(counts: tuple[int, ...], text: str, what: str) -> tuple[int, ...]:
    most = MOST_RANKS if what == "ranks" else MOST_ROWS
    if max(counts) > most:
        raise InputError(f"{text[:40]!r}: at most {most:,} {what}")
    return counts


def format_bytes(size_bytes: float) -> str:
    """Bytes for people, three significant digits.

    >>> format_bytes(0), format_bytes(999), format_bytes(24_685_069), format_bytes(16e9)
    ('0 B', '999 B', '24.7 MB', '16.0 GB')
    """
    return _scaled(size_bytes, (("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12), ("PB", 1e15)))


def format_seconds(time_s: float) -> str:
    """Seconds for people, three significant digits.

    >>> format_seconds(0.00002), format_seconds(0.0123), format_seconds(3)
    ('20.0 µs', '12.3 ms', '3.00 s')
    """
    return _scaled(time_s, (("ns", 1e-9), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)))


def format_bandwidth(bandwidth_bytes_per_s: float) -> str:
    """Bits per second for people.

    >>> format_bandwidth(3.125e9)
    '25.0 Gbit/s'
    """
    return _scaled(8 * bandwidth_bytes_per_s, (("bit/s", 1.0), ("kbit/s", 1e3), ("Mbit/s", 1e6), ("Gbit/s", 1e9)))


def format_count(count: float) -> str:
    """A count for people: all its digits up to a million, three significant ones above.

    >>> format_count(1460), format_count(33_762_577)
    ('1,460', '33.8M')
    """
    if count < 1e6:
        return f"{count:,.0f}" if count == round(count) else f"{count:,.1f}"
    return _scaled(count, (("M", 1e6), ("G", 1e9), ("T", 1e12)), separator="")


def _scaled(value: float, units: tuple[tuple[str, float], ...], separator: str = " ") -> str:
    unit, scale = next(((u, x) for u, x in reversed(units) if abs(value) >= x * 0.9995), units[0])
    number = value / scale
    if scale == 1.0 and number == round(number) and unit == "B":
        return f"{number:.0f}{separator}{unit}"
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f}{separator}{unit}"
