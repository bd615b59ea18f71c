"""Attaching in place: class swap, tensors in children, one State a model."""

from adapters._attach import (
    positions,  # prepares position ids before forwards with a prefix
    products,  # the shortcuts of factored weights
)
from adapters._attach.entries import bare_copy
from adapters._attach.install import base_parameters, install, remove, replace, set_trainable, tensors_of
from adapters._attach.labels import labels_of, set_labels
from adapters._attach.report import AttachReport
from adapters._attach.state import Adapter, adapters_of, state_of, unwrapped
from adapters._attach.verbs import activate, attach, detach, make_method, using
from adapters._attach.weights import base_weight

__all__ = [
    "Adapter",
    "AttachReport",
    "activate",
    "adapters_of",
    "attach",
    "bare_copy",
    "base_parameters",
    "base_weight",
    "detach",
    "install",
    "labels_of",
    "make_method",
    "positions",
    "products",
    "remove",
    "replace",
    "set_labels",
    "set_trainable",
    "state_of",
    "tensors_of",
    "unwrapped",
    "using",
]
