"""Figures for people: decimal units, three digits."""


def _scaled(value: float, units: tuple[str, ...], step: float = 1000.0) -> str:
    sign, value = ("-" if value < 0 else ""), abs(value)
    unit = units[0]
    for unit in units:  # noqa: B007 - the last one is used if none fits
        if value < 999.5:
            break
        if unit != units[-1]:
            value /= step
    if value >= 99.95 or (unit == units[0] and value == int(value)):
        digits = 0
    else:
        digits = 1 if value >= 9.995 else 2
    return f"{sign}{value:,.{digits}f} {unit}".rstrip()


def size(count: float) -> str:
    """Returns bytes as `16.3 GB` (decimal: 1 GB is 10^9 bytes)."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def number(count: float) -> str:
    """Returns a count as `9.62 G`; up to 9,999 unscaled."""
    if abs(count) < 10_000 and count == int(count):
        return f"{int(count):,}"
    return _scaled(count, ("", "k", "M", "G", "T", "P", "E"))


def flops(count: float) -> str:
    """Returns floating-point operations as `3.20 TFLOP`."""
    return _scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def seconds(value: float) -> str:
    """Returns a duration as `12.5 ms`."""
    if value == 0:
        return "0 s"
    if abs(value) < 0.9995:
        return _scaled(value * 1e9, ("ns", "us", "ms"))
    return _scaled(value, ("s",))


def ratio(new: float | None, old: float | None) -> str:
    """Returns `new / old` as `1.25x`; `same`, or `-` where it is not defined."""
    if new is None or old is None:
        return "-"
    if new == old:
        return "same"
    if not old:
        return "-"
    quotient = new / old
    return f"{quotient:.2f}x" if 0.1 <= quotient < 10 else f"{quotient:.3g}x"


def percent(part: float, whole: float) -> str:
    """Returns `part` of `whole` as `71.2 %`."""
    share = 100 * part / whole
    return f"{share:.1f} %" if share < 1000 else f"{share:,.0f} %"


def dims(shape: tuple[int, ...]) -> str:
    """Returns a shape as `128x1024`."""
    return "x".join(map(str, shape)) or "scalar"
