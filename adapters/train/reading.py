"""From a recipe file to a `Recipe`: every key known, every value of its type, or one sentence that names the line."""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from adapters import _registry
from adapters._contract import Method
from adapters._errors import AdapterError, nearest
from adapters.train.recipe import UNUSED, Evaluation, Recipe, Training
from adapters.train.source import Source, override, read_source

R = TypeVar("R")
_SECTIONS: Mapping[str, Any] = {"training": Training, "evaluation": Evaluation}


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
    values = dict(source.values)
    for section, cls in _SECTIONS.items():
        if section in values:
            values[section] = _record(cls, values[section], section, source)
    values["method"] = _method(values.get("method"), source)
    recipe = _record(Recipe, values, "", source)
    _check_together(recipe, source)
    return recipe


def _check_together(recipe: Recipe, source: Source) -> None:
    for key in UNUSED[recipe.task]:
        if key in source.places:
            raise AdapterError(f"{source.place(key)}: {key!r} means nothing for the task {recipe.task!r}; remove it.")
    batch, micro = recipe.training.batch, recipe.training.micro_batch
    if batch % micro:
        raise AdapterError(
            f"{source.place('training.micro_batch')}: training.batch ({batch} rows) must be a multiple of "
            f"training.micro_batch ({micro} rows)."
        )
    if recipe.start is not None and "text" not in {field.name for field in fields(recipe.method)}:
        raise AdapterError(f"{source.place('start')}: the method {recipe.method.name!r} has no text to start from.")
    for key in ("method.text", "method.length"):
        if recipe.start is not None and key in source.places:
            raise AdapterError(f"{source.place(key)}: `start: example` settles {key}; remove one of the two.")


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
    if hint in (Training, Evaluation, Method):
        return value
    converted = _convert(value, hint)
    if converted is _REFUSED:
        raise AdapterError(f"{source.place(dotted)}: {dotted} is {value!r}; it must be {_described(hint)}.")
    if "choices" in rules and converted not in rules["choices"]:
        choices = ["null" if choice is None else choice for choice in rules["choices"]]
        close = nearest(str(value), choices) or "."
        raise AdapterError(f"{source.place(dotted)}: {dotted} is {value!r}{close} Choices: {', '.join(choices)}.")
    if "least" in rules and converted < rules["least"]:
        raise AdapterError(f"{source.place(dotted)}: {dotted} is {value!r}; it must be at least {rules['least']}.")
    return converted


_REFUSED = object()


def _convert(value: Any, hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        options = (_convert(value, option) for option in get_args(hint))
        return next((option for option in options if option is not _REFUSED), _REFUSED)
    if get_origin(hint) is Literal:
        return value if value in get_args(hint) else _REFUSED
    if get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        listed = isinstance(items, list) and all(isinstance(item, str) for item in items)
        return tuple(items) if listed else _REFUSED
    if get_origin(hint) is Mapping:
        return _mapping(value, get_args(hint)[1])
    if hint is float:
        return _float(value)
    if hint is type(None):
        return None if value is None else _REFUSED
    return value if type(value) is hint else _REFUSED


def _mapping(value: Any, hint: Any) -> Any:
    items = {key: _convert(item, hint) for key, item in value.items()} if isinstance(value, dict) else {"": _REFUSED}
    return _REFUSED if any(item is _REFUSED for item in items.values()) else items


def _float(value: Any) -> Any:
    """YAML 1.1 reads 1e-3, without a point, as text."""
    try:
        return _REFUSED if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        return _REFUSED


def _described(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_described(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list of texts"
    if get_origin(hint) is Mapping:
        return f"a mapping from targets to {_described(get_args(hint)[1])}"
    named = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return named.get(hint, str(hint))
