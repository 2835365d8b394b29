"""Figures as text: a duration, a number, a share, a size, and the characters of a bar."""

BARS = " ▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """95 -> 1:35"""
    whole = round(max(0.0, seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def number(value: float | None, digits: int = 4) -> str:
    """1.23456 -> 1.2346; None (a number that was not finite) -> a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def file_size(count: float) -> str:
    """Return the size of a file or a text, in powers of 1000: 123456789 -> 123 MB, 1234567 -> 1.2 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * scale:
            return f"{count / scale:.{0 if count >= 99.95 * scale else 1}f} {unit}"
    return f"{count:.0f} B"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def memory_size(n: float) -> str:
    """Return a size in memory, in powers of 1024: 13652480 -> 13.0 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
