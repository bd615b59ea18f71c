"""Who speaks: the names of roles in rows, mapped to the four that chat templates know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from adapters._errors import AdapterError, nearest

ROLES = ("system", "user", "assistant", "tool")
KNOWN: Mapping[str, str] = {
    **{role: role for role in ROLES},
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}


def map_roles(conversations: Iterable[Sequence[str]], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Role name -> one of `ROLES`, for every name that occurs.

    A name that is not known is mapped only where there is one way to read it: every conversation is two names taking
    turns, the same one begins each and the other one ends it.

    Args:
        conversations: the role names of each, in order; iterated once.
        given: by hand; comes before what is known.

    Raises:
        AdapterError: a name could mean several roles, or `given` has one that is no role or does not occur.
    """
    given = dict(given or {})
    for name, role in given.items():
        if role not in ROLES:
            raise AdapterError(f"roles maps {name!r} to {role!r}{nearest(role, ROLES)} Roles: {', '.join(ROLES)}.")
    found: dict[str, str | None] = {}
    starts: set[tuple[str, ...]] = set()
    for names in conversations:
        for name in names:
            found.setdefault(name, given.get(name, KNOWN.get(name.strip().lower())))
        starts.add(_turn_taking([name for name in names if found[name] not in ("system", "tool")]))
    absent = [name for name in given if name not in found]
    if absent:
        raise AdapterError(f"roles maps {absent[0]!r}, which no row has; the roles there are {', '.join(found)}.")
    unknown = [name for name, role in found.items() if role is None]
    if unknown:
        found.update(_guess(unknown, found, starts - {()}))
    return {name: role for name, role in found.items() if role is not None}


def _turn_taking(names: Sequence[str]) -> tuple[str, ...]:
    """The two names that take turns, the first and the last speaker; one name alone where they do not."""
    if not names:
        return ()
    pair = (names[0], names[-1])
    regular = all(name == pair[i % 2] for i, name in enumerate(names))
    return pair if regular and pair[0] != pair[1] else (names[0],)


def _guess(unknown: Sequence[str], found: Mapping[str, str | None], starts: set[tuple[str, ...]]) -> dict[str, str]:
    if len(starts) == 1:
        (pair,) = starts
        guess = dict(zip(pair, ("user", "assistant"), strict=False))
        fits = all(found[name] in (None, role) for name, role in guess.items())
        if len(pair) == 2 and fits and set(unknown) <= set(pair):
            return guess
    example = ", ".join(f"{name!r}: {role!r}" for name, role in zip(unknown, ("user", "assistant"), strict=False))
    raise AdapterError(
        f"the role{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))} could be read in several ways; "
        f"say which is which, such as roles={{{example}}}, with one of {', '.join(ROLES)} for each."
    )
