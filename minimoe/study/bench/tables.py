"""How the tables of timings look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def new_table(title: str, caption: str, columns: Sequence[str]) -> Table:
    """An empty table: kernels to the left, numbers to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption=caption, caption_justify="left", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in ("kernel", "kind") else "right", no_wrap=True)
    return table
