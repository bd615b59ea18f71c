"""Whether an adapter belongs on a model."""

from __future__ import annotations

from torch import nn

from adapters._attach import adapters_of, require_rows, state_of, unwrapped
from adapters._contract import Site
from adapters._errors import AdapterError, WrongBase
from adapters._sites import SiteMap, sites
from adapters._store.bundle import Bundle
from adapters._store.verdicts import same_base

UNRECORDED = "could not be checked: the folder carries no record of its base"
UNCHECKED = "not checked, as asked: neither the base, nor digests and values"


def check_base(model: nn.Module, bundle: Bundle, force: str | None, check: bool = True) -> str:
    """How the base was found to be the adapter's, in a sentence.

    Raises:
        WrongBase: it is another one, and `force` is not "wrong-base".
        AdapterError: another `force`, or a model that cannot take the adapter, whatever is forced.
    """
    if force not in (None, "wrong-base"):
        raise AdapterError(f"force is {force!r}; the only check that can be skipped is force='wrong-base'.")
    model = unwrapped(model)
    if bundle.tokens is not None:
        require_rows(model, bundle.tokens)  # first, because here the sentence can say what to do
    if not check:
        require_sites(model, bundle)
        return UNCHECKED
    if bundle.base is None:
        return UNRECORDED
    try:
        return same_base(bundle.base, bundle.base_digest, model, exclude=bundle.head)
    except WrongBase as error:
        if force is None:
            raise WrongBase(f"{str(error).rstrip('.')}; force='wrong-base' loads the adapter nevertheless.") from error
        require_sites(model, bundle, sites(model))
        return f"wrong, and loaded by force: {error}"


def require_sites(model: nn.Module, bundle: Bundle, found: SiteMap | None = None) -> None:
    """What no force can help: a model that has not the adapter's sites, in their sizes, would fail in its forward.

    Args:
        found: the model's sites; None takes those that are known, or looks for them.

    Raises:
        AdapterError: a site is not there, or not of this size.
    """
    if found is None and any(bundle.sites == adapter.sites for adapter in adapters_of(model).values()):
        return
    state = state_of(model)
    found = found or (state.map if state is not None else None) or sites(model)
    known: list[Site] = [*found.weights, *found.streams, *found.keyvalues, *found.layers]
    here = {_size(site) for site in known}
    for site in bundle.sites:
        if _size(site) not in here:
            raise AdapterError(
                f"this model has no {site.kind} site {site.path} of the size that the adapter was made for."
            )


def _size(site: Site) -> tuple[object, ...]:
    sizes = ("path", "n_in", "n_out", "experts", "width", "heads", "k_dim", "v_dim")
    return (site.kind, *(getattr(site, name, None) for name in sizes))
