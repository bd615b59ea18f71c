"""Why a weight, a stream or an attention is a site or not, what its role is, and which rule said so."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from adapters._contract import KeyValueSite, LayerSite, Site, StreamSite, WeightSite
from adapters._errors import AdapterError, nearest
from adapters._fourbit import shape_of
from adapters._sites.discover import Discovery, discover
from adapters._sites.graph import Use
from adapters._sites.probe import Example
from adapters._sites.streams import Branch

_ROLES = {
    "attention.query": "it is the last product before the queries of an attention",
    "attention.key": "it is the last product before the keys of an attention",
    "attention.value": "it is the last product before the values of an attention",
    "attention.kv": "it lies before both keys and values of an attention",
    "attention.qkv": "it lies before queries, and keys or values, of an attention",
    "attention.gate": "its result multiplies what an attention made",
    "attention.output": "it follows the product of an attention's weights with its values",
    "mlp.gate": "an activation function lies between it and the product with another weight's result",
    "mlp.up": "its result reaches another weight of the branch",
    "mlp.gate_up": "two parts of its result are multiplied with each other",
    "mlp.down": "its result reaches no other weight of the branch",
    "router": "its result is chosen from, or is one number that weighs a whole branch",
    "ssm.in": "its result reaches another weight of a branch that mixes tokens without a softmax",
    "ssm.out": "its result reaches no other weight of a branch that mixes tokens without a softmax",
    "head": "what it makes does not go back to the residual stream, or lies outside the base model",
    "embedding": "it is looked up in",
    "embedding-tied": "it multiplies activations, and is looked up in as well",
    "other": "it lies in no branch of the residual stream, or feeds nothing that other rules know",
}


def explain(model: nn.Module, path: str, example: Example = None) -> str:
    """What is known of the parameters and modules that `path`, a path or a glob over paths, means.

    Raises:
        AdapterError: it means nothing in this model, or the model could not be run.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = [name for name, _ in model.named_modules() if name]
    wanted = [name for name in (*parameters, *modules) if fnmatchcase(name, path) or name == f"{path}.weight"]
    if not wanted:
        raise AdapterError(f"this model has no parameter or module {path!r}{nearest(path, [*parameters, *modules])}")
    found = discover(model, example)
    said = [text for name in wanted if (text := _said(found, model, parameters, name))]
    if not said:
        raise AdapterError(f"{path} means {wanted[0]}, which holds no weight and is neither a stream nor an attention.")
    return "\n\n".join(said)


def _said(found: Discovery, model: nn.Module, parameters: dict[str, nn.Parameter], name: str) -> str:
    if name in parameters:
        return _weight(found, parameters[name], name)
    sites: list[Site] = [*found.sites.streams, *found.sites.keyvalues, *found.sites.layers]
    lines = [line for site in sites if site.path == name for line in _place(found, site)]
    return "\n".join([f"{name}, a {type(model.get_submodule(name)).__name__}", *lines]) if lines else ""


def _weight(found: Discovery, parameter: nn.Parameter, name: str) -> str:
    lines = [f"{name} {tuple(shape_of(parameter))}"]
    named = [site for site in found.sites.weights if name in (site.path, *site.aliases)]
    for left in (*found.sites.unreached, *found.sites.others):
        if left.path == name:
            lines.append(f"  no site: {left.reason}")
    if len(lines) == 1 and not named:
        lines.append("  no site: it has less than two dimensions, or is another name of a parameter")
    for site in named:
        lines += _uses(found, site)
        lines.append(f"  a weight site, {site.n_in} -> {site.n_out}{_stored(site)}; rows of a batch: {site.rows}")
        lines.append(f"  access {site.access}: {_access(site)}")
        lines.append(f"  role {site.role}: {_ROLES.get(site.role, 'named by its branch')}")
        lines += [f"  in {_branch(branch)}" for branch in _around(found, site)]
        lines.append("  adapted by default" if site.default else f"  adapted only when named: {site.reason}")
    return "\n".join(lines)


def _stored(site: WeightSite) -> str:
    parts = [f"{site.experts} experts"] if site.experts else []
    parts += ["stored transposed"] if site.transposed else []
    parts += [f"its axes {site.folded} seen as one"] if site.folded else []
    return f" ({', '.join(parts)})" if parts else ""


def _uses(found: Discovery, site: WeightSite) -> list[str]:
    every = [*found.graph.uses_of.get(site.path, []), *found.graph.lookups_of.get(site.path, [])]
    for alias in site.aliases:
        every += [*found.graph.uses_of.get(alias, []), *found.graph.lookups_of.get(alias, [])]
    uses: dict[int, Use] = {use.index: use for use in every}
    if not uses:
        return ["  not met by the probe, but like one that was: it differs from it in one number of its path"]
    first = uses[min(uses)]
    times = f", {len(uses)} times" if len(uses) > 1 else ""
    return [f"  met as {first.op} in {first.module or 'the model'}: {first.x.shape} -> {first.out.shape}{times}"]


def _access(site: WeightSite) -> str:
    if site.access == "call":
        return "calling its module computes this product, a bias at most, and nothing else"
    if site.experts:
        return "a stack of matrices is indexed and multiplied by the module's own code"
    if site.folded:
        return "the product is a convolution, or one over more axes than a matrix has"
    if site.role == "embedding":
        return "a table is read where it is looked up in"
    return "the product is not all that its module computes, or other code reads the parameter"


def _around(found: Discovery, site: WeightSite) -> list[Branch]:
    names = {site.path, *site.aliases}
    return [branch for branch in found.branches if any(names & use.weights for use in branch.uses)][:2]


def _branch(branch: Branch) -> str:
    article = "an attention" if branch.kind == "attention" else f"the {branch.kind}"
    if branch.loose:
        return f"{article} branch, added inside {branch.call.path or 'the model'}, which no module returns by itself"
    key = "" if branch.key is None else f"[{branch.key}]"
    return f"{article} branch that {branch.call.path}{key} returns"


def _place(found: Discovery, site: Site) -> list[str]:
    default = "  acted on by default" if site.default else f"  acted on only when named: {site.reason}"
    if isinstance(site, StreamSite):
        where = f"argument {site.input!r}" if site.input is not None else f"what {site.tap} is given"
        known = where if site.input is not None or site.tap is not None else "not at hand"
        key = "" if site.output is None else f" {site.output}"
        what = f"{site.width} wide, is what an {site.branch} branch adds to the residual stream"
        return [
            f"  a stream site: its output{key}, {what}; the branch's input: {known}",
            f"  {site.branch}: {_KINDS[site.branch]}",
            default,
        ]
    if isinstance(site, KeyValueSite) and not site.heads:
        return [f"  an attention that takes no prefix: {site.reason}"]
    if isinstance(site, KeyValueSite):
        how = "transformers' attention interface" if site.product is None else "its own code"
        masks = "causal" if site.causal else "bidirectional"
        return [f"  an attention through {how}, {site.heads} heads of {site.k_dim}, {masks}; takes a prefix", default]
    return [f"  a layer of the main stack, {site.width} wide", default] if isinstance(site, LayerSite) else []


_KINDS = {
    "attention": "a softmax weighs values in it",
    "ssm": "tokens are mixed in it by a convolution, a recurrence or a product without a softmax",
    "mlp": "tokens are not mixed in it",
}
