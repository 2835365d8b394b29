"""Figures as text: a duration, a number, a share, and the characters of a bar."""

BARS = " ▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """95 -> 1:35"""
    whole = round(max(0.0, seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def number(value: float | None, digits: int = 4) -> str:
    """1.23456 -> 1.2346; None (a number that was not finite) -> a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
