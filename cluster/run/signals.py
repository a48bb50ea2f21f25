"""SIGINT and SIGTERM cancel the run's task, so that everything it opened is closed on the way out."""

from __future__ import annotations

import asyncio
import signal


def cancel_on_signals() -> None:
    """From now on both signals cancel the task that calls this.

    To be called again after connecting to Ray, whose core installs a handler of its own that aborts the process.
    """
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
