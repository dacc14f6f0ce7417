"""FILE.py:FUNCTION: a function of the user's own, loaded and called; and where a mistake in it is told. No torch here.

A file is run once, under a name that hides no other module; what it imports from its own folder is found there. It is
run again where its bytes have changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from low_precision.errors import SettingError, nearest, shown
from sources.named_file import FORMS, named_file

_LOADED: dict[Path, tuple[str, ModuleType]] = {}  # by file: a digest of its bytes, and the module


def is_function(name: str) -> bool:
    """Whether the name has the form FILE.py:FUNCTION."""
    file = named_file(name)
    return file is not None and file.suffix == ".py"


def function_named(setting: str, name: str) -> Callable[..., Any]:
    """The function of that name, FILE.py:FUNCTION; FILE is run if it was not yet.

    SettingError for `setting` where there is no such file or function. What the file raises while it runs is raised.
    """
    file = named_file(name)
    if file is None or file.suffix != ".py":
        raise SettingError(setting, shown(name), FORMS[".py"])
    module = _module(setting, name, file.path.absolute())
    function = getattr(module, file.part, None)
    if not callable(function) or file.part.startswith("_"):
        known = [word for word, thing in vars(module).items() if _is_defined_in(thing, module)]
        allowed = f"a function of {file.path.name}" + (f": {', '.join(known)}" if known else ", which has none")
        raise SettingError(setting, shown(name), allowed, nearest(file.part, known))
    return function


def call(setting: str, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """function(*args, **options). SettingError for `setting` where it does not take these; what it raises is raised."""
    try:
        inspect.signature(function).bind(*args, **options)
    except TypeError as error:
        raise SettingError(setting, f"{name} ({error})", _call_text(args, options)) from None
    except ValueError:  # of a builtin, which has no signature
        pass
    try:
        return function(*args, **options)
    except SystemExit as error:
        raise RuntimeError(f"it ends the program ({error})") from error
    except Exception as error:
        if place_of(error) is None:  # a class that leaves its making to torch: no line of the file was running
            error.place = _definition(function)  # type: ignore[attr-defined]
        raise


def options_of(function: Callable[..., Any]) -> set[str]:
    """The names of what it takes by keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def place_of(error: BaseException) -> str | None:
    """Where in the files that were run here an error was raised, or passed last: "FILE.py:12, in FUNCTION".

    None where none of them has to do with it.
    """
    files = set(map(str, _LOADED))
    folders = {str(path.parent) for path in _LOADED}
    for one in _chain(error):
        if place := getattr(one, "place", None):
            return str(place)
        if isinstance(one, SyntaxError) and one.filename and _is_theirs(one.filename, files, folders):
            return f"{_short(one.filename)}:{one.lineno}"
        places = [
            f"{_short(frame.co_filename)}:{line}" + ("" if frame.co_name == "<module>" else f", in {frame.co_name}")
            for frame, line in _frames(one.__traceback__)
            if _is_theirs(frame.co_filename, files, folders)
        ]
        if places:
            return places[-1]
    return None


def _definition(function: Callable[..., Any]) -> str | None:
    """Where it is defined, if that is in a file that was run here."""
    try:
        filename, (_, line) = inspect.getsourcefile(function), inspect.getsourcelines(function)
    except (TypeError, OSError):
        return None
    name = getattr(function, "__name__", "")
    return f"{_short(filename)}:{line}, in {name}" if filename in map(str, _LOADED) else None


def _module(setting: str, name: str, path: Path) -> ModuleType:
    try:
        raw = path.read_bytes()
    except OSError as error:
        allowed = f"{FORMS['.py']}, FILE.py a file that can be read"
        raise SettingError(setting, f"{shown(name)} ({error.strerror})", allowed) from None
    digest = hashlib.sha256(raw).hexdigest()
    if path in _LOADED and _LOADED[path][0] == digest:
        return _LOADED[path][1]
    module_name = f"file_{hashlib.sha256(str(path).encode(errors='surrogateescape')).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    _LOADED[path] = ("", module)  # so that place_of knows the file while it runs
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # at the end: a file there hides no package
    sys.modules[module_name] = module  # where dataclasses and pickle look for it
    try:
        exec(compile(raw, str(path), "exec"), vars(module))
    except SystemExit as error:
        raise RuntimeError(f"it ends the program ({error})") from error
    except (SyntaxError, ValueError) as error:
        if place_of(error) is None:  # of `compile`, for a null byte: no line of the file was running
            error.place = _short(str(path))  # type: ignore[attr-defined]
        raise
    _LOADED[path] = (digest, module)
    return module


def _is_defined_in(thing: Any, module: ModuleType) -> bool:
    return callable(thing) and getattr(thing, "__module__", None) == module.__name__ and thing.__name__[:1] != "_"


def _call_text(args: tuple[Any, ...], options: dict[str, Any]) -> str:
    words = [*("..." if len(shown(arg, repr)) > 40 else shown(arg, repr) for arg in args)]
    words += [f"{name}={shown(value, repr)}" for name, value in options.items()]
    return f"a function that can be called with ({', '.join(words)})"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it, and so on; each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _frames(traceback: TracebackType | None) -> Iterator[tuple[Any, int]]:
    while traceback is not None:
        yield traceback.tb_frame.f_code, traceback.tb_lineno
        traceback = traceback.tb_next


def _is_theirs(filename: str, files: set[str], folders: set[str]) -> bool:
    """A file that was run here, or one beside it, as far as that is none of ours or of a package."""
    if filename in files:
        return True
    path = Path(filename)
    ours = Path(__file__).parent.parent
    return str(path.parent) in folders and path.parent != ours and "site-packages" not in path.parts


def _short(filename: str) -> str:
    """Relative to the current folder where it is below that."""
    path = Path(filename)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
