"""A user's reward function: found by import path, checked, and called in a thread or on the event loop."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

from reward.calls import in_thread
from reward.errors import NotRetryable, RewardError, one_line
from reward.interface import Answer, RewardCall, RewardFunction, RewardPrompt


class FailedFunction(Exception):
    """The user's function raised; says what and where."""


class UserReward:
    """A reward of the user's."""

    timed = True

    def __init__(self, label: str, function: RewardFunction, options: Mapping[str, Any], places: int) -> None:
        self.label = label
        self.places = places
        self._function = function
        self._options = MappingProxyType(dict(options))

    async def start(self) -> None:
        """Nothing to bring up: the module was imported when the reward was built."""

    async def score(self, prompt: RewardPrompt, answers: Sequence[Answer]) -> Sequence[float]:
        call = RewardCall(
            prompt=prompt.plain(),
            whole_reference_text=prompt.whole_reference_text,
            answers=tuple(answers),
            options=self._options,
        )
        try:
            if _is_async(self._function):
                returned = self._function(call)
            else:
                returned = await in_thread(lambda: self._function(call))
            return await returned if inspect.isawaitable(returned) else returned
        except NotRetryable:
            raise
        except Exception as error:
            raise FailedFunction(f"{one_line(error)}{_place(error)}") from error

    async def close(self) -> None:
        """Nothing to give back."""


def load_function(path: str, where: str) -> RewardFunction:
    """The function at 'package.module:function', also from the working directory.

    `where` is the field to name in errors, e.g. 'reward.rewards[0].path'. Raises RewardError in one line that says
    what is missing and the nearest name.
    """
    module_name, _, name = path.partition(":")
    module = _import(module_name, f"{where} '{path}'")
    members = vars(module)
    if name not in members:
        public = [known for known, value in members.items() if callable(value) and not known.startswith("_")]
        raise RewardError(f"{where} '{path}': module '{module_name}' has no '{name}'{_nearest(name, public)}")
    function = members[name]
    _check_signature(function, f"{where} '{path}'")
    return function


def _import(name: str, where: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # last, so that a file of the user's never hides a library
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise RewardError(f"{where} needs the module '{error.name}', which is not installed") from error
        parent, _, last = error.name.rpartition(".")
        known = _modules(parent, here)
        raise RewardError(
            f"{where}: there is no module '{error.name}' in {here} or on Python's path{_nearest(last, known)}"
        ) from error
    except (Exception, SystemExit) as error:
        raise RewardError(f"{where} cannot be imported: {one_line(error)}{_place(error)}") from error


def _modules(parent: str, here: str) -> list[str]:
    if not parent:
        return [found.name for found in pkgutil.iter_modules([here])]
    inside: Iterable[str] = vars(sys.modules[parent]).get("__path__", ())
    return [found.name for found in pkgutil.iter_modules(inside)]


def _check_signature(function: object, where: str) -> None:
    if inspect.isclass(function):
        raise RewardError(f"{where} is a class; name a function, or an object of the class made in the module")
    if not callable(function):
        raise RewardError(f"{where} is of type {type(function).__name__}; name a function")
    signature = inspect.signature(function)
    try:
        signature.bind(object())
    except TypeError as error:
        raise RewardError(
            f"{where} takes {signature}; it must take one argument, the RewardCall: def reward(call) -> list[float]"
        ) from error


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _place(error: BaseException) -> str:
    """' (file.py:12)': where it was raised, or '' for an error that never ran (a syntax error names its own place)."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames:
        return ""
    return f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})"
