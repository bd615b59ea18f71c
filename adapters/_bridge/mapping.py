"""Enters our methods where peft looks for its own, and gives attached roots the face of a `PeftModel`."""

from __future__ import annotations

from typing import Any

from torch import nn

from adapters._attach.state import ENTER, FACES, STATE
from adapters._attach.swap import PREPARE, add_faces, further_faces, roots
from adapters._bridge.config import TYPE, AdaptersConfig
from adapters._bridge.face import PeftFace
from adapters._bridge.joining import join

PEFT, BELOW = "peft", "peft-below"


def connect() -> None:
    """Called once, when peft has been imported."""
    from peft import mapping
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[TYPE] = AdaptersConfig
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[TYPE] = "adapters."
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TYPE] = join
    further_faces[PEFT] = (ENTER, with_face)
    further_faces[BELOW] = (PREPARE, with_model)
    for root in list(roots):
        for module in root.modules():
            if {ENTER, PREPARE} & set(module.__dict__.get(FACES, ())):
                add_faces(module, module.__dict__[STATE])  # the class that these faces have from now on


def with_face(made: type[nn.Module]) -> type[nn.Module]:
    """A subclass of an attached root's class that `isinstance` takes for a PeftModel.

    PeftModel comes last, below `nn.Module`: its ancestors stand in another order than those of transformers' models, so
    that Python refuses it as a plain base.
    """
    from peft import PeftModel

    class Face(type(made)):  # type: ignore[misc]
        def mro(cls) -> list[type]:
            order: list[Any] = super().mro()
            return [*order[:-1], *(each for each in PeftModel.__mro__ if each not in order), object]

    face: type[nn.Module] = Face(made.__name__, (PeftFace, made), _like(made))
    return face


def with_model(made: type[nn.Module]) -> type[nn.Module]:
    """The class of the base model below the heads: trainers read `model.base_model.model`, and mean the root by it."""
    space: dict[str, Any] = {"model": property(_root_of)}
    metaclass: Any = type(made)
    below: type[nn.Module] = metaclass(made.__name__, (made,), {**_like(made), **space})
    return below


def _root_of(below: nn.Module) -> nn.Module:
    own = below._modules.get("model")
    state = below.__dict__.get(STATE)
    return own if own is not None else next((root for root in roots if root.__dict__.get(STATE) is state), below)


def _like(made: type[nn.Module]) -> dict[str, Any]:
    return {"__module__": made.__module__, "__qualname__": made.__qualname__, "__doc__": made.__doc__}
