"""Configurations in and out of text: TOML, dotted overrides, and mistakes named where they stand."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megalite.config import Config, DataConfig, Section
from megalite.errors import ConfigError, is_unicode

M = TypeVar("M", bound=BaseModel)

# By pydantic's kind of error: what TOML calls what should have been there.
_TOML_NAMES = {"tuple_type": "be a list", "model_type": "be a table", "dict_type": "be a table"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A run's configuration, as `load_toml` reads it."""
    return load_toml(Config, path, overrides)


def load_toml(root: type[M], path: str | Path, overrides: Sequence[str] = ()) -> M:
    """Read a TOML file into `root`, apply `section.key=value` overrides, check everything.

    Raises:  ConfigError naming the file, line, key, value and remedy
    """
    path = Path(path)
    try:
        source = path.read_text(encoding="utf-8-sig")  # Windows' editors put a byte order mark first
        values = tomllib.loads(source)
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}; configs/ holds examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except (ValueError, RecursionError) as error:  # also of a number too long, or tables too deep
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    return _build(root, values, overrides, path, source)


def load_settings(section: type[M], overrides: Sequence[str]) -> M:
    """A section made of its defaults and `key=value` overrides alone.

    Raises:  ConfigError
    """
    return _build(section, {}, overrides, None, "")


def build_config(values: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Check plain nested values (as `tomllib` gives them) with overrides on top.

    Raises:  ConfigError
    """
    return _build(Config, values, overrides, None, "")


def _build(
    root: type[M], values: dict[str, Any], overrides: Sequence[str], path: Path | None, source: str
) -> M:
    overridden = set()
    for override in overrides:
        overridden.add(_apply_override(values, override))
    if root is Config:
        _read_mixture(values)
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, root, path, source, overridden)) from None


class _MixtureFile(Section):
    """What `data.mixture` names: a `[data]` table that says which data, not how they are read."""

    data: DataConfig


def _read_mixture(values: dict[str, Any]) -> None:
    """Put the keys of the file that `data.mixture` names in its place; paths in it are relative to it.

    Raises:  ConfigError if the file is unusable, or the run sets one of its keys otherwise
    """
    data = values.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("mixture"), str):
        return
    path = Path(data.pop("mixture"))
    if not path.exists():
        raise ConfigError(f"no file data.mixture={path}; `megalite data mix` writes one")
    found = load_toml(_MixtureFile, path).data.model_dump(exclude_unset=True)
    for source in (*found.get("sources", ()), *found.get("validation", ())):
        if "://" not in source["path"]:
            source["path"] = os.path.normpath(path.parent / source["path"])
    for key, value in found.items():
        if data.setdefault(key, value) != value:
            ours, theirs = (" ".join(toml_value(each).split())[:60] for each in (data[key], value))
            raise ConfigError(
                f"data.{key}={ours} with data.mixture={path}, which says {theirs}; keep one of the two"
            )


def to_toml(config: BaseModel) -> str:
    """The resolved configuration as TOML that `load_config` reads back to an equal object."""
    values = config.model_dump(exclude_none=True)
    lines = [f"{key} = {toml_value(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for section, table in values.items():
        if isinstance(table, dict):
            lines += ["", f"[{section}]"]
            lines += [f"{key} = {toml_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def describe_keys(root: type[BaseModel] = Config) -> str:
    """Every key with its default, meaning and choices, one a line, under the header of its table."""
    lines = []

    def walk(section: type[BaseModel], prefix: str) -> None:
        tables, width = [], max(28, len(prefix) + max(map(len, section.model_fields)))
        for key, field in section.model_fields.items():
            inner = _section_type(section, [key])
            if inner is not section:
                tables.append((f"{prefix}{key}", field, inner))
                continue
            default = "required" if field.is_required() else toml_value(field.default)
            choices = ", ".join(map(toml_value, _choices(field.annotation)))
            among = f"; one of {choices}" if choices else ""
            lines.append(f"  {prefix + key:<{width}} {default:<12} {field.description}{among}")
        for name, field, inner in tables:
            header = f"[[{name}]]" if get_origin(field.annotation) in (list, tuple) else f"[{name}]"
            lines.append(f"\n{header}  {field.description or (inner.__doc__ or '').splitlines()[0]}")
            walk(inner, f"{name}.")

    walk(root, "")
    return "\n".join(lines)


def _choices(kind: Any) -> tuple[Any, ...]:
    """The values that a key, or each one in its list, must be one of."""
    inner = get_args(kind)
    return inner if get_origin(kind) is Literal else next(filter(None, map(_choices, inner)), ())


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key → (old, new) for every value in which two dumped configurations differ."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        here, there = old.get(key), new.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            changes |= changed_keys(here, there, f"{prefix}{key}.")
        elif here != there:
            changes[f"{prefix}{key}"] = (here, there)
    return changes


def toml_value(value: Any) -> str:
    """A value as it stands behind `key =`; a table inline."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
        body = "".join(escapes.get(c, c if c.isprintable() else f"\\U{ord(c):08X}") for c in value)
        return f'"{body}"'
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return "none" if value is None else repr(value)


def _apply_override(values: dict[str, Any], override: str) -> str:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[A-Za-z_][\w]*(\.[A-Za-z_][\w]*)*", key):
        raise ConfigError(f"override {override!r} is not of the form section.key=value, e.g. train.steps=100")
    if not is_unicode(text):
        raise ConfigError(f"override {override!r} is not UTF-8; give text in that encoding")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith(("[", "{")):  # most often the shell took the quotes in it
            raise ConfigError(
                f"override {_short(override)} is not TOML: {error}; quote the text in it, and the whole for "
                """the shell, as in 'data.sources=[{path="data/train"}]'"""
            ) from None
        value = text  # an unquoted string, as a shell user writes it
    *parents, leaf = key.split(".")
    table = values
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
    table[leaf] = value
    return key


def _explain(
    error: ValidationError, root: type[BaseModel], path: Path | None, source: str, overridden: set[str]
) -> str:
    """The first problem on one line (and how many more there are)."""
    # A misspelt key is also a missing one; the spelling is what the user can mend.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    where = tuple(first["loc"])
    key = ".".join(str(part) for part in where)
    value, kind = first["input"], first["type"]
    if kind == "extra_forbidden":
        known = list(_section_type(root, where[:-1]).model_fields)
        near = difflib.get_close_matches(str(where[-1]), known, n=1)
        elsewhere = difflib.get_close_matches(str(where[-1]), _all_keys(root), n=1, cutoff=0.85)
        if near:
            meant = (*where[:-1], near[0])
            hint = f"; did you mean {'.'.join(map(str, meant))}?"
            problems = [each for each in problems if (each["type"], each["loc"]) != ("missing", meant)]
        elif elsewhere:
            hint = f"; did you mean {' or '.join(_all_keys(root)[elsewhere[0]])}?"
        else:
            hint = f"; known keys: {', '.join(known)}"
        text = f"unknown key {key}{hint}"
    elif kind == "missing":
        text = f"{key} is required ({_describe(root, where)})"
    elif kind == "value_error":
        text = first["msg"].removeprefix("Value error, ")
        if key:
            text = f"{key}: {text}"
        elif named := re.match(r"\w+\.\w+", text):  # a cross-field check names its first key
            where, key = tuple(named[0].split(".")), named[0]
    else:
        expected = _TOML_NAMES.get(kind) or first["msg"].partition("should ")[2] or first["msg"]
        text = f"{key}={_short(value)}: should {expected} ({_describe(root, where)})"
    is_overridden = any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for name in overridden)
    place = "command line" if is_overridden else _locate(path, source, where)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{text}{f' ({place})' if place else ''}{more}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _section_type(root: type[BaseModel], where: Iterable[Any]) -> type[BaseModel]:
    current = root
    for part in where:
        field = current.model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            current = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), current)
    return current


def _all_keys(root: type[BaseModel]) -> dict[str, list[str]]:
    """Leaf key → full dotted keys, for keys put into the wrong section."""
    keys: dict[str, list[str]] = {}
    for section, field in root.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for leaf in kind.model_fields:
                keys.setdefault(leaf, []).append(f"{section}.{leaf}")
        else:
            keys[section] = [section]
    return keys


def _describe(root: type[BaseModel], where: tuple[Any, ...]) -> str:
    while where and not isinstance(where[-1], str):
        where = where[:-1]  # an entry of a list is told of by the list
    field = _section_type(root, where[:-1]).model_fields.get(where[-1]) if where else None
    return (field.description if field is not None else None) or "a table of settings"


def _locate(path: Path | None, source: str, where: tuple[Any, ...]) -> str:
    """`file:line` of a key in TOML text, or the nearest enclosing table, or the file."""
    if path is None:
        return ""
    names = [part for part in where if isinstance(part, str)]
    best, section = 0, ""
    for number, line in enumerate(source.splitlines(), 1):
        line = line.strip()
        if header := re.match(r"\[\[?\s*([\w.\- \"]+?)\s*\]", line):
            section = header[1]
            if names and ".".join(names).startswith(section):
                best = number
        elif assignment := re.match(r"([\w.\-\"]+)\s*=", line):
            full = f"{section}.{assignment[1]}" if section else assignment[1]
            if full == ".".join(names):
                return f"{path}:{number}"
            if names and ".".join(names).startswith(full + "."):
                best = number
    return f"{path}:{best}" if best else str(path)
