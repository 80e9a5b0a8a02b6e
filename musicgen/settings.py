"""One way from YAML and the command line to a frozen dataclass, for every command.

`parse(Config, argv, layers=[...])` reads YAML layers in order, then dotted overrides (`--optim.lr 1e-4`), and
returns the dataclass. jsonargparse does the typing and conversion; ours is only the hint: an unknown key fails
with the nearest name that exists, in YAML as on the command line.
"""

from __future__ import annotations

import builtins
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

T = TypeVar("T")


class SettingsError(ValueError):
    """A setting that does not exist or has a value that is not allowed; the message is for the person typing."""


def names(config_class: type, prefix: str = "") -> Iterator[str]:
    """Every dotted setting name of a dataclass, groups included."""
    hints = typing.get_type_hints(config_class)
    for f in dataclasses.fields(config_class):
        yield prefix + f.name
        kind = hints[f.name]
        for candidate in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(candidate):
                yield from names(cast(type, candidate), f"{prefix}{f.name}.")


def _reject_unknown(given: Sequence[str], config_class: type, where: str) -> None:
    known = list(names(config_class))
    hints = typing.get_type_hints(config_class)
    open_names = tuple(f"{name}." for name, kind in hints.items() if typing.get_origin(kind) is dict)
    problems = []
    for name in given:
        if name in known or name.startswith(open_names):  # a mapping's keys are its reader's to check
            continue
        leaf = {k.rsplit(".", 1)[-1]: k for k in known}
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        near = near or [leaf[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaf), n=1)]
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
        problems.append(f"unknown setting {name!r} in {where}{hint}")
    if problems:
        raise SettingsError("\n".join(problems))


def _flat(tree: dict[str, Any], config_class: type, prefix: str = "") -> Iterator[str]:
    groups = set(names(config_class))
    for key, value in tree.items():
        name = f"{prefix}{key}"
        yield name
        if isinstance(value, dict) and any(g.startswith(name + ".") for g in groups):
            yield from _flat(value, config_class, name + ".")


def parse(config_class: type[T], argv: Sequence[str], *, layers: Sequence[str | Path] = (), prog: str = "") -> T:
    """Settings from YAML `layers`, then `argv` (`--name value`, `--group.name value`, `--config file.yaml`).

    Raises:
        SettingsError: unknown name (with the nearest known one), wrong type, missing file.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog or None, exit_on_error=False, description=(config_class.__doc__ or "").strip())
    parser.add_argument("--config", action="config", help="a YAML file of settings; later ones win")
    parser.add_class_arguments(config_class, None)
    if any(a in ("-h", "--help") for a in argv):
        parser.print_help()
        raise SystemExit(0)
    tokens: list[str] = []
    for layer in layers:
        tokens += ["--config", str(layer)]
    tokens += list(argv)
    given = [t[2:].split("=", 1)[0] for t in tokens if t.startswith("--")]
    _reject_unknown([g for g in given if g != "config"], config_class, "the command line (ARGS)")
    for i, token in enumerate(tokens):
        path = token.split("=", 1)[1] if token.startswith("--config=") else None
        if token == "--config" and i + 1 < len(tokens):
            path = tokens[i + 1]
        if path is None:
            continue
        if not Path(path).is_file():
            raise SettingsError(f"settings file {path!r} does not exist; give a YAML file or leave --config out")
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise SettingsError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
        _reject_unknown(list(_flat(tree, config_class)), config_class, path)
    try:
        parsed = parser.parse_args(tokens)
        built = parser.instantiate(parsed)
    except SystemExit as error:  # jsonargparse leaves this way on some errors
        raise SettingsError("the settings could not be read; see the message above") from error
    except Exception as error:
        raise SettingsError(str(error)) from error
    values = {f.name: getattr(built, f.name) for f in dataclasses.fields(cast(Any, config_class))}
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain nested dicts, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def from_dict(config_class: type[T], tree: dict[str, Any]) -> T:
    """The inverse of `to_dict`; unknown keys raise `SettingsError` with the nearest name, wrong types with the type."""
    if not isinstance(tree, dict):
        raise SettingsError(f"{config_class.__name__}: expected a mapping of settings, found {type(tree).__name__}")
    _reject_unknown(list(_flat(tree, config_class)), config_class, config_class.__name__)
    hints = typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    for f in dataclasses.fields(cast(Any, config_class)):
        if f.name not in tree:
            continue
        value, kind = tree[f.name], hints[f.name]
        if not _fits(value, kind):
            wanted = str(kind) if typing.get_origin(kind) else kind.__name__
            raise SettingsError(f"{f.name} is {value!r}; it must be {wanted.replace('typing.', '')}")
        inner = next((k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)), None)
        values[f.name] = from_dict(cast(type, inner), value) if inner is not None and isinstance(value, dict) else value
    return config_class(**values)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value out of a JSON file can be one of this type; types that are not listed here take anything."""
    parts = typing.get_args(kind)
    match typing.get_origin(kind) or kind:
        case typing.Literal:
            return value in parts
        case typing.Union | types.UnionType:
            return any(_fits(value, part) for part in parts)
        case builtins.tuple | builtins.list:
            items = isinstance(value, (list, tuple))
            return items and all(_fits(v, parts[0]) for v in value if parts)
        case builtins.float:
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case builtins.int:
            return isinstance(value, int) and not isinstance(value, bool)
        case builtins.str | builtins.bool | types.NoneType:
            return isinstance(value, kind)
        case _:
            return not dataclasses.is_dataclass(kind) or isinstance(value, (dict, cast(type, kind)))


def run(main: Any) -> None:
    """Call `main(argv)`; errors meant for the user are printed without a traceback, exit code 2.

    A first `--` is left out: launchers that take `--run` for an option of their own (torchrun) need it before ours.
    """
    from musicgen import heap
    from musicgen.errors import UserError

    heap.keep_freed()

    try:
        code = main(sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:])
    except (SettingsError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(code or 0)
