"""From the words of a user to sites: roles, paths, globs or a predicate, each of which must match."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from adapters._contract import Method, Site, StreamMethod, StreamSite, WeightSite
from adapters._errors import AdapterError, nearest
from adapters._sites.map import SiteMap
from adapters._sites.unreadable import refusal

Predicate: TypeAlias = Callable[[Site], bool]
Targets: TypeAlias = str | Iterable[str] | Predicate | None


def select(sites: SiteMap, method: Method, targets: Targets = None) -> tuple[Site, ...]:
    """The sites on which `method` will act, in order of execution.

    Args:
        sites: The model's map.
        method: Its kind decides which sites it can act on.
        targets: None for what the method wants; a predicate over sites; or one or more of: a role (`mlp.down`), a
            glob over roles (`attention.*`), a path with or without `.weight`, the end of a path (`q_proj`), a glob
            over paths (`*.layers.0.*`), `all` for every default site.

    Raises:
        AdapterError: An entry matches nothing, or nothing is left to adapt.
    """
    known = _candidates(sites, method)
    if callable(targets):
        chosen = [site for site in known if targets(site)]
        asked = "the predicate given as targets"
    elif targets is None:
        chosen = [site for site in known if method.wants(site)]
        asked = _name(method)
    else:
        entries = [targets] if isinstance(targets, str) else list(targets)
        matches = [_matching(entry, known, sites) for entry in entries]
        chosen = [site for site in known if any(site in match for match in matches)]
        asked = "an empty list of targets"
    if not chosen and (why := refusal(sites.unreached)):
        raise AdapterError(f"{asked} finds no site that it accepts: {why}.")
    if not chosen:
        raise AdapterError(
            f"{asked} accepts none of the {len(known)} {known[0].kind} sites of {sites.model}; {_exist(known)}"
        )
    return tuple(chosen)


def _candidates(sites: SiteMap, method: Method) -> tuple[Site, ...]:
    """The sites of the first kind that the method can act on and the model has, without those it cannot act at."""
    by_kind = [sites.of(kind) for kind in method.kinds()]
    by_default = [of for of in by_kind if any(site.default for site in of)]
    found = next(iter(by_default or [of for of in by_kind if of]), ())
    if not found and (why := refusal(sites.unreached)):
        raise AdapterError(f"{_name(method)} finds no site that it accepts: {why}.")
    if not found:
        kinds = " or ".join(method.kinds())
        raise AdapterError(f"{sites.model} has no {kinds} site, which {_name(method)} needs; it has {_kinds(sites)}")
    able = tuple(site for site in found if can_act(method, site))
    if not able:
        raise AdapterError(
            f"{_name(method)} reads what a branch is given, which is at hand at no branch of {sites.model}"
        )
    return able


def can_act(method: Method, site: Site) -> bool:
    """Whether the site offers what the method needs: a method that reads a branch's input cannot act without it."""
    needs_input = isinstance(method, StreamMethod) and method.reads_input()
    return not (needs_input and isinstance(site, StreamSite) and site.input is None and site.tap is None)


def _matching(entry: str, known: Sequence[Site], sites: SiteMap) -> list[Site]:
    if not isinstance(entry, str):
        raise AdapterError(f"targets are strings or one predicate, not {type(entry).__name__}: {entry!r}")
    found = [site for site in known if matches(entry, site)]
    if not found:
        words = [*_roles(known), *_ends(known), *(name for site in known for name in _paths(site))]
        why = refusal(each for each in sites.unreached if _means(entry, each.path))
        why = why or ("" if any(site.default for site in known) else refusal(sites.unreached))
        no = f"no {known[0].kind} site of {sites.model} matches {entry!r}"
        raise AdapterError(f"{no}: {why}." if why else f"{no}{nearest(entry, words)}; {_exist(known)}")
    return found


def matches(entry: str, site: Site) -> bool:
    """Whether one entry of `targets` means this site."""
    if entry == "all":
        return site.default
    names = _paths(site)
    return fnmatchcase(site.role, entry) or any(_means(entry, name) for name in names)


def _means(entry: str, path: str) -> bool:
    return fnmatchcase(path, entry) or fnmatchcase(path, f"*.{entry}")


def _paths(site: Site) -> list[str]:
    paths = [site.path, *site.aliases] if isinstance(site, WeightSite) else [site.path]
    return paths + [path.removesuffix(".weight") for path in paths if path.endswith(".weight")]


def _roles(known: Sequence[Site]) -> list[str]:
    return sorted({site.role for site in known})


def _ends(known: Sequence[Site]) -> list[str]:
    return sorted({_paths(site)[-1].rpartition(".")[2] for site in known})


def _exist(known: Sequence[Site]) -> str:
    why = sorted({site.reason for site in known if site.reason})
    left = f"; left out by default because: {'; '.join(why)}" if why and not any(site.default for site in known) else ""
    return f"roles here: {', '.join(_roles(known))}; names here: {', '.join(_ends(known))}{left}"


def _kinds(sites: SiteMap) -> str:
    counts = {kind: len(sites.of(kind)) for kind in ("weight", "stream", "keyvalue", "layer")}
    return ", ".join(f"{count} {kind} sites" for kind, count in counts.items())


def _name(method: Method) -> str:
    return method.name or type(method).__name__
