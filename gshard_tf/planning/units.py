"""Figures as people read them: decimal units, three digits."""


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
    """Bytes, such as `16.3 GB` (decimal: 1 GB is 10^9 bytes)."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def number(count: float) -> str:
    """A large count, such as `9.62 G`; up to 9,999 as it is."""
    if abs(count) < 10_000 and count == int(count):
        return f"{int(count):,}"
    return _scaled(count, ("", "k", "M", "G", "T", "P", "E"))


def flops(count: float) -> str:
    """Floating-point operations, such as `3.20 TFLOP`."""
    return _scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def seconds(value: float) -> str:
    """A duration, such as `12.5 ms`."""
    if value == 0:
        return "0 s"
    if abs(value) < 0.9995:
        return _scaled(value * 1e9, ("ns", "us", "ms"))
    return _scaled(value, ("s",))


def ratio(new: float | None, old: float | None) -> str:
    """`new / old` as `1.25x`; `same`, or `-` where there is none."""
    if new is None or old is None:
        return "-"
    if new == old:
        return "same"
    if not old:
        return "-"
    found = new / old
    return f"{found:.2f}x" if 0.1 <= found < 10 else f"{found:.3g}x"


def percent(part: float, whole: float) -> str:
    """`part` of `whole`, such as `71.2 %`."""
    found = 100 * part / whole
    return f"{found:.1f} %" if found < 1000 else f"{found:,.0f} %"


def dims(shape: tuple[int, ...]) -> str:
    """A shape, such as `128x1024`."""
    return "x".join(map(str, shape)) or "scalar"
