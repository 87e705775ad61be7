"""Settings: frozen pydantic models chosen by `kind`, recipe YAML, dotted overrides, one-line errors."""

import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from sparsemix.errors import ConfigError
from sparsemix.inputs import load_yaml, read_yaml

__all__ = [
    "Config",
    "ConfigError",
    "apply_overrides",
    "config_hash",
    "load_yaml",
    "named",
    "nearest",
    "parse",
    "to_yaml",
]


def nearest(name: object, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' when a known name is close to the given one, else ''."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def named(setting: str, raw: Any, known: Sequence[str]) -> Any:
    """{setting: raw} where `raw` is a plain name. Raises ValueError if that is none of `known`."""
    if not isinstance(raw, str):
        return raw
    if raw not in known:
        raise ValueError(f"{raw!r} is none of {', '.join(known)}{nearest(raw, known)}")
    return {setting: raw}


def _bad(name: str, value: object, rule: str) -> ValidationError:
    error = PydanticCustomError("sparsemix", "{rule}", {"rule": rule})
    return ValidationError.from_exception_data("settings", [InitErrorDetails(type=error, loc=(name,), input=value)])


class Config(BaseModel):
    """Base of all settings. A subclass with `family = {}` is the root of a family; a subclass of it with
    `kind: Literal["foo"] = "foo"` joins the family and is found by its kind wherever the root is expected."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        polymorphic_serialization=True,
        hide_input_in_errors=True,
    )
    family: ClassVar[dict[str, type["Config"]] | None] = None

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if cls.family is not None and (field := cls.model_fields.get("kind")):
            cls.family[field.default] = cls

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, data: Any, handler: Any) -> Any:
        if isinstance(data, Mapping):
            field = cls.model_fields.get("kind")
            if cls.family is not None and field is None:
                kind = data.get("kind")
                if not isinstance(kind, str) or kind not in cls.family:
                    rule = f"is none of {', '.join(sorted(cls.family))}{nearest(kind, cls.family)}"
                    raise _bad("kind", kind, rule)
                return cls.family[kind].model_validate(data)
            for name in data:
                if name not in cls.model_fields:
                    # What chose these settings is none of them.
                    own = [own for own in cls.model_fields if cls.family is None or own != "kind"]
                    rule = f"is no setting here{_meant(str(name), cls)} (known: {', '.join(own)})"
                    raise _bad(str(name), data[name], rule)
            for name, value in data.items():
                if isinstance(value, int) and not -(2**63) <= value < 2**63:
                    raise _bad(name, value, "must lie between -2^63 and 2^63")
                if isinstance(value, bool) and bool not in _leaf_types(cls.model_fields[name].annotation):
                    raise _bad(name, value, "must not be true or false")
        return handler(data)

    def rule(self, holds: bool, name: str, rule: str) -> None:
        """Raise an error about setting `name` unless `holds`. For use in model validators."""
        if not holds:
            raise _bad(name, getattr(self, name), rule)

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some settings changed."""
        return type(self).model_validate({**self.model_dump(), **changes})


def _meant(name: str, cls: type[Config]) -> str:
    """As `nearest`; a setting of that very name one level below goes first."""
    below = [
        f"{field}.{name}"
        for field, about in cls.model_fields.items()
        for leaf in _leaf_types(about.annotation)
        if isinstance(leaf, type) and issubclass(leaf, Config) and name in leaf.model_fields
    ]
    return nearest(below[0], below) if below else nearest(name, cls.model_fields)


def _leaf_types(annotation: Any) -> set[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return {leaf for arg in typing.get_args(annotation) for leaf in _leaf_types(arg)}
    if typing.get_origin(annotation) is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    return {annotation}


C = TypeVar("C", bound=Config)


def parse(cls: type[C], raw: Mapping[str, Any]) -> C:
    """Settings of type `cls` from plain data. Raises ConfigError, one line per wrong setting."""
    try:
        return cls.model_validate(raw)
    except UnicodeEncodeError as error:
        # What a message quotes: pydantic keeps messages in UTF-8.
        raise ConfigError(f"{_short(error.object)} (a part of this is not UTF-8; write it so)") from None
    except ValidationError as error:
        errors = error.errors()
        # A list all of whose items are wrong also counts as too short.
        inner = {e["loc"][:depth] for e in errors for depth in range(len(e["loc"]))}
        told = [e for e in errors if e["type"] != "too_short" or e["loc"] not in inner]
        raise ConfigError("; ".join(dict.fromkeys(_sentence(e) for e in _of_choices(told)))) from None


# How pydantic names the choices of a setting that takes one of several types.
_CHOICE = re.compile(r"literal\[.*|constrained-.*|(tuple|list|dict)\[.*|int|float|bool|str|none")


def _of_choices(errors: list[Any]) -> Iterator[Any]:
    """The errors, of which those of one value's several choices are one: `input should be 'auto' or ...`."""
    by_value: dict[Any, list[Any]] = {}
    for number, error in enumerate(errors):
        *parents, last = error["loc"] or ("",)
        choice = isinstance(last, str) and _CHOICE.fullmatch(last) is not None
        by_value.setdefault(tuple(parents) if choice else number, []).append(error)
    for where, several in by_value.items():
        if isinstance(where, int):
            yield several[0]
        else:
            rules = dict.fromkeys(error["msg"].removeprefix("Input should be ") for error in several)
            yield {**several[0], "loc": where, "msg": f"Input should be {' or '.join(rules)}"}


def _sentence(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"]) or "settings"
    if error["type"] == "string_unicode":
        return f"{path}={_short(error['input'])} is not UTF-8; rename it"
    if error["type"] == "missing":
        return f"{path} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # A rule about the settings as a whole, worded in full.
        return f"{path}: {message}" if error["loc"] else message
    value = error["input"]
    shown: object = type(value).__name__
    if isinstance(value, (str, int, float, bool, type(None))):
        shown = value
    elif isinstance(value, (list, tuple)):
        shown = ",".join(_short(part) for part in value[:20])
    return f"{path}={_short(shown)} {message[0].lower()}{message[1:]}"


def _short(value: object) -> str:
    """A value as errors show it: on one line, its head where it is long."""
    text = " ".join(_digits(value).split())
    return text if len(text) <= 200 else f"{text[:100]}… ({len(text)} letters)"


def _digits(value: object) -> str:
    # Python writes no number of more than 4,300 digits out.
    return hex(value) if isinstance(value, int) and not -(2**63) <= value < 2**63 else str(value)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`raw` with dotted overrides such as `model.blocks.1.ffn.top_k=2` applied; values are YAML.

    A new `kind` clears its sibling settings, which belong to the old kind. Raises ConfigError."""
    raw = json.loads(json.dumps(raw))
    for override in overrides:
        path, sign, text = override.partition("=")
        if not sign or not all(path.split(".")):
            raise ConfigError(f"override {override!r} must look like setting.name=value")
        try:
            value = read_yaml(text)
        except (yaml.MarkedYAMLError, yaml.reader.ReaderError):
            raise ConfigError(f"{path}={_short(text)} is not a YAML value; quote it") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}={_short(text)}: {error}") from None
        if isinstance(value, str) and (number := _as_number(value)) is not None:
            value = number
        node: Any = raw
        *parents, last = path.split(".")
        for depth, part in enumerate(parents):
            node = _step(node, part, ".".join(parents[: depth + 1]))
        if isinstance(node, list):
            node[_index(node, last, path)] = value
        elif isinstance(node, dict):
            if last == "kind" and node.get("kind") != value:
                node.clear()
            node[last] = value
        else:
            raise ConfigError(f"{path}: {'.'.join(parents)} is a single value and has no settings inside")
    return raw


def _as_number(text: str) -> float | None:
    # YAML 1.1 reads 3e-4 and 1e13 as strings; people write them as numbers.
    try:
        return float(text) if any(c.isdigit() for c in text) else None
    except ValueError:
        return None


def _step(node: Any, part: str, path: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, path)]
    if isinstance(node, dict):
        return node.setdefault(part, {})
    raise ConfigError(f"{path}: there are no settings below a single value")


def _index(node: list[Any], part: str, path: str) -> int:
    # Other scripts' digits and superscripts are digits too, and five thousand of them no number.
    if not re.fullmatch(r"[0-9]{1,9}", part) or int(part) >= len(node):
        raise ConfigError(f"{path}: {part!r} must be a list position from 0 to {len(node) - 1}")
    return int(part)


def to_yaml(config: Config) -> str:
    """The settings as YAML text that `parse` reads back to an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def without_later(config: Config, written: dict[str, Any], later: tuple[str, ...]) -> dict[str, Any]:
    """A dump without those of the `later` settings that have their defaults. Runs are named by the hash of their
    settings: one that earlier versions did not have must not rename what they began."""
    defaults = {name: type(config).model_fields[name].default for name in later}
    return {k: v for k, v in written.items() if k not in defaults or getattr(config, k) != defaults[k]}


def config_hash(config: Config) -> str:
    """Ten hex digits that name these settings."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
