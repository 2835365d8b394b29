"""The part of a terminal that is drawn again and again, at its lower end: through resizing, ctrl-Z and the background."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic as now
from types import FrameType
from typing import Any

from rich.console import Console, ConsoleDimensions, ConsoleRenderable, RenderableType
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

STOPPED = 1.0  # seconds without a drawing after which the process must have been stopped
SHOW_CURSOR = b"\x1b[?25h"


class LiveScreen(Live):
    """Draws something four times a second below what is printed.

    How a terminal that becomes smaller moves its lines differs between terminals. So the display then begins again at the top: what was
    on the screen is scrolled out of it, where it can be looked up. In the background, where a shell has the terminal, nothing is drawn.
    """

    def __init__(self, console: Console, heading: Text, display: RenderableType, stopped: Callable[[float], None]) -> None:
        """heading: is printed above the display. stopped: is called with the seconds for which ctrl-Z has stopped the process."""
        super().__init__(console=console, refresh_per_second=4, get_renderable=lambda: display)
        self.heading, self.stopped = heading, stopped
        self.size: ConsoleDimensions | None = None  # of the terminal, when the display was drawn last
        self.seen = now()  # when it was last time to draw
        self.moved = False  # someone else has printed: the cursor is no longer at the display's end
        self.alone = False  # nothing but the heading and the display is on the screen
        self.handlers: dict[int, Any] = {}

    def start(self, refresh: bool = False) -> None:
        """Print the heading, and draw from now on."""
        self.console.print(self.heading)
        super().start(refresh)
        if not self._in_front():
            self.console.show_cursor(True)
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGTSTP"):
            if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
                self.handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._suspend)
            self.handlers[signal.SIGCONT] = signal.signal(signal.SIGCONT, self._continue)

    def stop(self) -> None:
        """Draw for the last time, and leave that on the screen."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self.handlers.clear()
        super().stop()

    def say(self, text: Text) -> None:
        """Print a text above the display."""
        with self._lock:  # one of the two threads prints at a time
            self.console.print(text)

    def refresh(self) -> None:
        self.seen = now()
        if self._in_front() or not self.is_started:
            super().refresh()
        else:
            self.moved = True

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Put the display below what is to be printed, and before it what moves the cursor to the display's beginning."""
        if self.is_started and not self._in_front():
            self.moved = True
            return renderables
        _, *below = super().process_renderables(renderables)
        with self._lock:
            before: list[ConsoleRenderable] = [self._live_render.position_cursor()]
            size, old = self.console.size, self.size
            if self.moved:
                before = [Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), ControlType.HIDE_CURSOR)]
            elif old is not None and (size.width < old.width or size.height < old.height):
                before = [] if self.alone else [Control.move_to(0, size.height - 1), Text("\n" * (size.height - 1))]
                before += [Control(ControlType.HOME, ControlType.CLEAR), self.heading]
                self.alone = True
            self.size, self.moved = size, False
            self.alone = self.alone and all(isinstance(part, Control) for part in renderables)
        return [*before, *below]

    # ---- signals ----------------------------------------------------------------------------------------------------------------

    def _in_front(self) -> bool:
        """Return False if another process has the terminal, such as a shell that this one runs in the background of."""
        try:
            return os.tcgetpgrp(self.console.file.fileno()) == os.getpgrp()
        except (OSError, ValueError, AttributeError):  # not a terminal, or not the one that controls this process
            return True

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Leave the terminal as a shell needs it, and stop as if there were no handler."""
        began = now()
        held = self._lock.acquire(timeout=1.0)
        try:
            with suppress(OSError, ValueError, AttributeError):
                os.write(self.console.file.fileno(), b"\r\n" + SHOW_CURSOR)  # not print, which may be under way in this thread
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_kill(threading.get_ident(), number)  # returns when the process is continued
            signal.signal(number, self._suspend)
            self.moved = True
        finally:
            if held:
                self._lock.release()
        self.stopped(now() - began)

    def _continue(self, number: int, frame: FrameType | None) -> None:
        """Draw the display anew after a stop that could not be handled; the signal also comes without one, as from `timeout`."""
        self.moved = self.moved or now() - self.seen > STOPPED
