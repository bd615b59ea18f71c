"""Attaching in place: class swap, tensors in children, one State a model."""

from adapters._attach import (
    divided,  # refuses forwards that would read a part of a weight
    positions,  # prepares position ids before forwards with a prefix
    products,  # the shortcuts of factored weights
)
from adapters._attach.bank import Given
from adapters._attach.choose import SelectionReport
from adapters._attach.compiled import use_tables
from adapters._attach.heads import bare_copy
from adapters._attach.install import (
    base_parameters,
    check_attachable,
    install,
    remove,
    replace,
    set_trainable,
    tensors_of,
)
from adapters._attach.labels import labels_of, put_labels, set_labels
from adapters._attach.report import AttachReport
from adapters._attach.state import Adapter, adapters_of, state_of, unwrapped
from adapters._attach.tables import owners, require_rows, table_of, table_paths
from adapters._attach.tokens import PLAIN_TOKENS, Tokens
from adapters._attach.verbs import activate, attach, compose, detach, make_method, using
from adapters._attach.weights import base_weight

__all__ = [
    "Adapter",
    "AttachReport",
    "Given",
    "SelectionReport",
    "PLAIN_TOKENS",
    "Tokens",
    "activate",
    "adapters_of",
    "attach",
    "bare_copy",
    "base_parameters",
    "base_weight",
    "check_attachable",
    "compose",
    "detach",
    "divided",
    "install",
    "labels_of",
    "owners",
    "require_rows",
    "table_of",
    "table_paths",
    "make_method",
    "positions",
    "products",
    "remove",
    "replace",
    "put_labels",
    "set_labels",
    "set_trainable",
    "state_of",
    "tensors_of",
    "unwrapped",
    "use_tables",
    "using",
]
