"""From a recipe file to a `Recipe`: every key known, every value of its type, or one sentence that names the line."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from adapters import _registry
from adapters._contract import Method
from adapters._errors import AdapterError, nearest
from adapters.train.agreement import check_together, settle_length
from adapters.train.recipe import Data, Evaluation, Recipe, Training
from adapters.train.source import Source, override, read_source
from adapters.train.values import REFUSED, convert, described

R = TypeVar("R")
_SECTIONS: Mapping[str, Any] = {"data": Data, "training": Training, "evaluation": Evaluation}


def read_recipe(path: str | Path, method: str | None = None, settings: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file.

    Args:
        path: a YAML file with the keys of `Recipe`, and `variants`: method name -> what to change for that method.
        method: a method to use in place of the file's, with the variant of that name if the file has one.
        settings: `key=value` changes, keys dotted; they come last.

    Raises:
        AdapterError: the sentence names file, line, what was found and the nearest valid key.
    """
    source = read_source(Path(path))
    variants = _take_variants(source)
    for name in variants:
        _build(_variant(source, variants, name))  # a slip in a variant shows without running it
    chosen = source if method is None else _variant(source, variants, method)
    override(chosen, settings)
    return _build(chosen)


def _take_variants(source: Source) -> dict[str, Any]:
    variants = source.values.pop("variants", None) or {}
    if not isinstance(variants, dict) or not all(isinstance(value, dict) for value in variants.values()):
        raise AdapterError(f"{source.place('variants')}: variants maps method names to the keys that they change.")
    for name in variants:
        if name not in _registry.names():
            close = nearest(str(name), _registry.names()) or "."
            raise AdapterError(f"{source.place(f'variants.{name}')}: the variant {name!r} is no method{close}")
    return variants


def _variant(source: Source, variants: dict[str, Any], name: str) -> Source:
    """The file's values with another method: its variant's hyperparameters, or the method's own defaults."""
    _registry.get(name)  # refuses a name that no method has
    changed = copy.deepcopy(source)
    asked = f"--method {name}"
    current = changed.values.get("method")
    if name in variants or not isinstance(current, dict) or current.get("name") != name:
        changed.values["method"] = {}
    changed.put("method.name", name, asked)
    if name in variants:
        changed.overlay(variants[name], f"variants.{name}")
    return changed


def _build(source: Source) -> Recipe:
    settle_length(source)
    values = dict(source.values)
    for section, cls in _SECTIONS.items():
        if values.get(section) is not None:
            values[section] = _record(cls, values[section], section, source)
    values["method"] = _method(values.get("method"), source)
    recipe = _record(Recipe, values, "", source)
    check_together(recipe, source)
    return recipe


def _method(values: Any, source: Source) -> Method:
    if not isinstance(values, dict) or "name" not in values:
        known = ", ".join(_registry.names())
        raise AdapterError(f"{source.place('method')}: method needs a name, such as {{name: lora}}; methods: {known}.")
    name = values["name"]
    try:
        cls = _registry.get(str(name))
    except AdapterError as error:
        raise AdapterError(f"{source.place('method.name')}: {error}") from error
    return _record(cls, {key: value for key, value in values.items() if key != "name"}, "method", source)


def _record(cls: type[R], values: Any, section: str, source: Source) -> R:
    """One frozen record from plain values; `section` is its dotted key."""
    if not isinstance(values, dict):
        raise AdapterError(f"{source.place(section)}: {section} is a section of keys, found {values!r}.")
    known = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    built = {}
    for key, value in values.items():
        dotted = f"{section}.{key}" if section else str(key)
        if key not in known:
            where, extra = (section, []) if section else ("a recipe", ["variants"])
            close = nearest(str(key), [*known, *extra]) or "."
            raise AdapterError(
                f"{source.place(dotted)}: no key {key!r} in {where}{close} Keys: {', '.join([*known, *extra])}."
            )
        built[key] = _value(value, hints[key], known[key].metadata, dotted, source)
    for key, field in known.items():
        if key not in built and field.default is MISSING and field.default_factory is MISSING:
            raise AdapterError(f"{source.place(section)}: {section or 'the recipe'} needs the key {key!r}.")
    try:
        return cls(**built)
    except AdapterError as error:
        raise AdapterError(f"{source.place(section)}: {error}") from error


def _value(value: Any, hint: Any, rules: Mapping[str, Any], dotted: str, source: Source) -> Any:
    """`value` as the annotated type, within the limits of the field."""
    if hint in (Training, Evaluation, Method, Data | None):
        return value
    converted = convert(value, hint)
    if converted is REFUSED:
        raise AdapterError(f"{source.place(dotted)}: {dotted} is {value!r}; it must be {described(hint)}.")
    if "choices" in rules and converted not in rules["choices"]:
        choices = ["null" if choice is None else choice for choice in rules["choices"]]
        close = nearest(str(value), choices) or "."
        raise AdapterError(f"{source.place(dotted)}: {dotted} is {value!r}{close} Choices: {', '.join(choices)}.")
    if "least" in rules and converted is not None and converted < rules["least"]:
        raise AdapterError(f"{source.place(dotted)}: {dotted} is {value!r}; it must be at least {rules['least']}.")
    return converted
