"""MODULE:NAME -> the object. The working directory is searched first, as `python -m` does.

What was typed wrong is a WrongUsage with the nearest name that exists; a module that is there and breaks while it is
imported is a SetupError with the place.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from eventbus.cli.output import WrongUsage
from eventbus.errors import SetupError

if TYPE_CHECKING:
    from eventbus.event import Catalogue
    from eventbus.service import Service

T = TypeVar("T")

_TARGET = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*)(?::([^\W\d]\w*))?")


def services(targets: Iterable[str]) -> tuple[Service[Any], ...]:
    """The services that *targets* name, each once; `MODULE` alone is every service in it."""
    from eventbus.service import Service

    found: dict[int, Service[Any]] = {}
    for target in targets:
        module, name = _split(target)
        for service in _named(module, name, Service) if name else _all_in(module, Service):
            found[id(service)] = service
    return tuple(found.values())


def catalogue(target: str) -> Catalogue:
    """The catalogue that *target* names; for `MODULE` alone its only one, else all of its events."""
    from eventbus.event import Catalogue, Event

    module, name = _split(target)
    if name:
        return _named(module, name, Catalogue)[0]
    found = _values(module, Catalogue)
    if len(found) > 1:
        names = ", ".join(f"{module.__name__}:{name}" for name in _names(module, Catalogue))
        raise WrongUsage(f"{module.__name__} has several catalogues: say which ({names})")
    if found:
        return found[0]
    events = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Event)]
    events = [event for event in dict.fromkeys(events) if hasattr(event, "event_type")]
    if not events:
        raise WrongUsage(f"{module.__name__} has neither a Catalogue nor an Event: give the module with your events")
    return Catalogue(*events)


def module(name: str) -> ModuleType:
    """The module called *name*.

    Raises:
        WrongUsage: there is none. SetupError: it cannot be imported.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise WrongUsage(f"there is no module {name!r}, neither in {here} nor installed{_instead(name)}") from None
        raise _broken(name, error) from error
    except (Exception, SystemExit) as error:
        raise _broken(name, error) from error


def _split(target: str) -> tuple[ModuleType, str | None]:
    if match := re.fullmatch(r"([\w./\\-]+)\.py(:\w+)?", target):
        dotted = re.sub(r"[/\\]+", ".", os.path.normpath(match[1])).strip(".")
        raise WrongUsage(f"{target!r} is a file: give its module, {dotted + (match[2] or '')!r}")
    match = _TARGET.fullmatch(target)
    if match is None:
        raise WrongUsage(f"{target!r} is no MODULE:NAME: give one like 'shop.payments:service'")
    return module(match[1]), match[2]


def _instead(name: str) -> str:
    """A remedy for a module that is not there: its last word may be an object of the module before it."""
    parent, _, last = name.rpartition(".")
    if not parent:
        return ": is this the right folder?"
    try:
        outer = module(parent)
    except (WrongUsage, SetupError):
        return ": is this the right folder?"
    return f": did you mean '{parent}:{last}'?" if hasattr(outer, last) else ""


def _broken(name: str, error: BaseException) -> SetupError:
    what = " ".join(str(error).split()) or "no message"
    return SetupError(f"{name} cannot be imported: {type(error).__name__}: {what}{_place(error)}")


def _place(error: BaseException) -> str:
    """The innermost line of the program under import; the import machinery is nobody's fault."""
    if isinstance(error, SyntaxError):
        return ""  # it says where
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen ")]
    frames = [f for f in frames if f.filename not in (__file__, importlib.__file__)]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _values(module: ModuleType, kind: type[T]) -> list[T]:
    return list({id(value): value for value in vars(module).values() if isinstance(value, kind)}.values())


def _names(module: ModuleType, kind: type[object]) -> list[str]:
    return [name for name, value in vars(module).items() if isinstance(value, kind)]


def _all_in(module: ModuleType, kind: type[T]) -> list[T]:
    found = _values(module, kind)
    if not found:
        raise WrongUsage(f"{module.__name__} has no {kind.__name__} at module level: name the module that has one")
    return found


def _named(module: ModuleType, name: str, kind: type[T]) -> list[T]:
    known = _names(module, kind)
    there = f" ({kind.__name__}s there: {', '.join(known)})" if known else f" (there is no {kind.__name__} in it)"
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, known or vars(module), n=1)
        hint = f": did you mean '{module.__name__}:{close[0]}'?" if close else there
        raise WrongUsage(f"{module.__name__} has no {name!r}{hint}")
    value = getattr(module, name)
    if not isinstance(value, kind):
        what = "a class" if isinstance(value, type) else f"of type {type(value).__name__}"
        raise WrongUsage(f"{module.__name__}:{name} is {what}, not a {kind.__name__}{there}")
    return [value]
