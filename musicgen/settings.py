"""One way from YAML and the command line to a frozen dataclass, for every command.

`parse(Config, argv, layers=[...])` reads YAML layers in order, then dotted overrides (`--optim.lr 1e-4`), and
returns the dataclass. jsonargparse does the typing and conversion; ours are the hints, in YAML as on the command line:
an unknown key fails with the nearest name that exists, a group must be a mapping, a list is shown as it is written, and
a number is finite.
"""

from __future__ import annotations

import builtins
import dataclasses
import difflib
import itertools
import json
import math
import os
import re
import reprlib
import shlex
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

T = TypeVar("T")
MANY = 30  # names that nobody reads in an error


class SettingsError(ValueError):
    """A setting that does not exist or has a value that is not allowed; the message is for the person typing."""


def names(config_class: type, prefix: str = "") -> Iterator[str]:
    """Every dotted setting name of a dataclass, groups included."""
    return (name for name, _ in _kinds(config_class, prefix))


def _kinds(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(config_class)
    for f in dataclasses.fields(config_class):
        kind = hints[f.name]
        yield prefix + f.name, kind
        for candidate in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(candidate):
                yield from _kinds(cast(type, candidate), f"{prefix}{f.name}.")


def _group_of(kind: Any) -> type | None:
    """The dataclass of a setting that is a group of settings; None for any other, such as a list of dataclasses."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return next((cast(type, part) for part in parts if dataclasses.is_dataclass(part)), None)


def _reject_unknown(given: Sequence[str], config_class: type, where: str) -> None:
    known = list(names(config_class))
    hints = typing.get_type_hints(config_class)
    open_names = tuple(f"{name}." for name, kind in hints.items() if typing.get_origin(kind) is dict)
    problems = []
    for name in given:
        if name in known or name.startswith(open_names):  # a mapping's keys are its reader's to check
            continue
        leaf = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [leaf[name]] if name in leaf else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        near = near or [leaf[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaf), n=1)]
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
        if not near and len(known) > MANY:
            hint = "; --help lists those that are known"
        problems.append(f"unknown setting {name!r} in {where}{hint}")
    if problems:
        raise SettingsError("\n".join(problems))


def _named_in(tree: dict[str, Any], config_class: type, prefix: str = "") -> Iterator[str]:
    groups = set(names(config_class))
    for key, value in tree.items():
        name = f"{prefix}{key}"
        yield name
        if isinstance(value, dict) and any(g.startswith(name + ".") for g in groups):
            yield from _named_in(value, config_class, name + ".")


def _check_groups(tree: Mapping[Any, Any], config_class: type, where: str) -> None:
    """Refuse anything but a mapping in place of a group: the group's settings would silently be the defaults again."""
    kinds = dict(_kinds(config_class))

    def check(part: Mapping[Any, Any], prefix: str) -> None:
        for key, value in part.items():
            name = f"{prefix}{key}"
            kind = kinds.get(name)
            if _group_of(kind) is None or (value is None and types.NoneType in typing.get_args(kind)):
                continue
            if not isinstance(value, dict):
                raise _no_group(name, "null" if value is None else reprlib.repr(value), kind, where)
            check(value, f"{name}.")

    check(tree, "")


def _no_group(name: str, given: str, kind: Any, where: str) -> SettingsError:
    inner = [f.name for f in dataclasses.fields(cast(Any, _group_of(kind)))]
    return SettingsError(
        f"{name} is {given[:80]} in {where}, but it is a group, a mapping of the settings {', '.join(inner)}; give "
        f"some of them, such as {name}.{inner[0]}, or leave {name} out"
    )


def _mappings(config_class: type) -> list[str]:
    """The settings that are mappings of texts."""
    return [name for name, kind in typing.get_type_hints(config_class).items() if kind == dict[str, str]]


def _texts_apart(tokens: Sequence[str], config_class: type) -> tuple[list[str], dict[str, str]]:
    """The words with a mark in place of each text of a mapping, which jsonargparse would read as YAML
    (`--attributes.genre "r&b: soul"`); the texts by their marks."""
    starts = tuple(f"--{name}." for name in _mappings(config_class))
    out, texts = list(tokens), dict[str, str]()
    for place, token in enumerate(tokens):
        if not token.startswith(starts):
            continue
        name, equals, text = token.partition("=")
        mark = f"\ue000{place}"
        if equals:
            out[place], texts[mark] = f"{name}={mark}", text
        elif place + 1 < len(tokens) and not tokens[place + 1].startswith("--"):
            out[place + 1], texts[mark] = mark, tokens[place + 1]
    return out, texts


def _said(error: Exception, config_class: type) -> str:
    """What jsonargparse said; of a group or a list that was given as something else in words of our own."""
    text = str(error)
    found = re.match(r'Parser key "([^"]+)":\s*(.*?)(?:(?:Got|Given) value: (.*))?$', text, re.DOTALL)
    if found is None:
        return text
    name, wanted, given = found[1], found[2], found[3] or ""
    kind = dict(_kinds(config_class)).get(name)
    if _group_of(kind) is not None and (config := re.match(r"Unable to load config '(.*?)'\n", wanted, re.DOTALL)):
        return str(_no_group(name, config[1], kind, "the command line (ARGS)"))
    if "<class 'tuple'>" not in wanted:
        if not given or not _allowed(kind):
            return text
        truth = typing.get_origin(kind) is typing.Literal and given in ("True", "False")
        hint = ' (in YAML with quotes, "off": without them it is a truth value)' if truth else ""
        return f"{name} is {given!r}; it must be {_allowed(kind)}{hint}"
    part = (*typing.get_args(kind), None)[0]
    if typing.get_origin(part) is tuple:
        example = [[10 * row + place for place in range(len(typing.get_args(part)))] for row in range(2)]
        return f"{name} is {given!r}; it must be a list of lists: --{name} {shlex.quote(str(example))}, say"
    items = [] if given == "None" else [word.strip() for word in given.split(",")]
    strings = part is str
    written = json.dumps(items, ensure_ascii=False) if strings else f"[{', '.join(items)}]"
    return f"{name} is {given!r}; it must be a list: --{name} {shlex.quote(written)}, or in YAML {name}: {written}"


def _allowed(kind: Any) -> str:
    """What values of a plain type are, in words; empty for other types."""
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(str(value) for value in typing.get_args(kind))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return " or ".join(words[part] for part in parts) if all(part in words for part in parts) else ""


def _check_finite(name: str, value: Any) -> None:
    """Refuse NaN and infinity: nothing here means them, and what they do is found out far from where they were set."""
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{name} is {value}; it must be a finite number")
    for part in value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else ():
        _check_finite(name, part)


def read_yaml(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """The settings in a YAML file, as they stand there; empty where it holds nothing or comments alone.

    Raises:
        SettingsError: no such file, or one that cannot be read as a mapping.
    """
    if not os.path.isfile(path):
        raise SettingsError(f"settings file {os.fspath(path)!r} does not exist; give a YAML file or leave --config out")
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
        _check_once(yaml.compose(text, yaml.SafeLoader))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise SettingsError(f"{path} cannot be read: it is nested too deeply for settings") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a date or a number that cannot be one
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, (dict, types.NoneType)):
        raise SettingsError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree or {}


def _check_once(root: Any) -> None:
    """Raises `yaml.YAMLError` where a mapping names a key twice: YAML takes the last one and forgets the others."""
    nodes, seen = [root], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):  # aliases may make a ring
            continue
        seen.add(id(node))
        nodes += [part for child in node.value for part in (child if isinstance(child, tuple) else (child,))]
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        if twice := [str(key) for key in keys if keys.count(key) > 1]:
            where = f"in the mapping from line {node.start_mark.line + 1} on"
            raise yaml.YAMLError(f"{twice[0]!r} stands there twice, {where}; put both together")


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
    tokens, texts = _texts_apart([*tokens, *argv], config_class)
    given = [t[2:].split("=", 1)[0] for t in tokens if t.startswith("--")]
    _reject_unknown([g for g in given if g != "config"], config_class, "the command line (ARGS)")
    kept: list[str] = []
    while tokens:
        words = [tokens.pop(0)]
        if words == ["--config"]:
            words += tokens[:1]
            del tokens[:1]
        path = words[0].split("=", 1)[1] if words[0].startswith("--config=") else words[1] if len(words) > 1 else None
        if path is not None:
            tree = read_yaml(path)
            _reject_unknown(list(_named_in(tree, config_class)), config_class, path)
            _check_groups(tree, config_class, path)
            if not tree:  # jsonargparse takes no file without settings
                continue
        kept += words
    try:
        parsed = parser.parse_args(kept)
        leaves = dict(parsed.items())
        _check_groups(leaves, config_class, "the command line (ARGS)")  # inside a group given as JSON
        built = parser.instantiate(parsed)
    except SystemExit as error:  # jsonargparse leaves this way on some errors
        raise SettingsError("the settings could not be read; see the message above") from error
    except Exception as error:
        raise SettingsError(_said(error, config_class)) from error
    values = {f.name: getattr(built, f.name) for f in dataclasses.fields(cast(Any, config_class))}
    for name in _mappings(config_class):
        values[name] = {key: texts.get(text, text) for key, text in values[name].items()}
    try:
        config = config_class(**values)
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error
    for name, value in leaves.items():  # last: where a setting has bounds, its own words name them
        _check_finite(name, value)
    return config


def split(config_class: type, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that set what `config_class` has, `-h` and `--help` among them, and all others."""
    names, own, rest = {f.name for f in dataclasses.fields(config_class)}, list[str](), list[str]()
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if word in ("-h", "--help"):
            own.append(word)
        elif name.removeprefix("--") in names:
            own += [word] if equals else [word, *itertools.islice(words, 1)]
        else:
            rest.append(word)
    return own, rest


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain nested dicts, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def from_dict(config_class: type[T], tree: dict[str, Any]) -> T:
    """The inverse of `to_dict`; unknown keys raise `SettingsError` with the nearest name, wrong types with the type."""
    if not isinstance(tree, dict):
        raise SettingsError(f"{config_class.__name__}: expected a mapping of settings, found {type(tree).__name__}")
    _reject_unknown(list(_named_in(tree, config_class)), config_class, config_class.__name__)
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
