"""A recipe file as plain values, each with the place it came from, so that an error can name the line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from adapters._errors import AdapterError


@dataclass
class Source:
    """Nested values and, by dotted key, where each was written."""

    name: str
    values: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)

    def place(self, key: str) -> str:
        """Where `key` was written, or a key inside it, or the nearest key around it."""
        inside = next((place for other, place in self.places.items() if other.startswith(f"{key}.")), None)
        if key not in self.places and key and inside is not None:
            return inside
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key, self.name)

    def overlay(self, values: Mapping[str, Any], at: str, onto: str = "") -> None:
        """Lays the values written at the dotted key `at` over those at `onto`, leaf by leaf."""
        for key, value in values.items():
            target = f"{onto}.{key}" if onto else key
            if isinstance(value, dict):
                self.overlay(value, f"{at}.{key}", target)
            else:
                self.put(target, value, self.place(f"{at}.{key}"))

    def put(self, key: str, value: Any, place: str) -> None:
        """Sets one dotted key."""
        *sections, last = key.split(".")
        here = self.values
        for section in sections:
            inside = here.setdefault(section, {})
            if not isinstance(inside, dict):
                raise AdapterError(f"{place}: {key!r} cannot be set, because {section!r} is not a section.")
            here = inside
        here[last] = value
        self.places[key] = place


def read_source(path: Path) -> Source:
    """Reads a YAML file.

    Raises:
        AdapterError: there is no such file, it is not YAML, not a mapping, or a key occurs twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"the recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise AdapterError(f"{path}, line {line}: this is not YAML: {error.problem}.") from error
    if not isinstance(root, yaml.MappingNode):
        raise AdapterError(f"{path}: a recipe is a mapping of keys to values, such as `task: function_calls`.")
    source = Source(str(path), values)
    _note(root, "", source)
    return source


def _note(node: yaml.MappingNode, prefix: str, source: Source) -> None:
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        place = f"{source.name}, line {key.start_mark.line + 1}"
        if dotted in source.places:
            raise AdapterError(f"{place}: {dotted!r} is given twice; the first is in {source.places[dotted]}.")
        source.places[dotted] = place
        if isinstance(value, yaml.MappingNode):
            _note(value, f"{dotted}.", source)


def override(source: Source, settings: Iterable[str]) -> None:
    """Applies `key=value` settings, keys dotted, values written as in YAML.

    Raises:
        AdapterError: a setting has no equals sign, or its value is not YAML.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise AdapterError(f"--set {setting}: write it as key=value, such as training.steps=30.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise AdapterError(f"--set {setting}: {text!r} is not a YAML value.") from error
        source.put(key.strip(), value, f"--set {setting}")
