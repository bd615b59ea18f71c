"""What training loops that know nothing of adapters need: adapter-only checkpoints, and runs that resume exactly.

Nothing of transformers or accelerate is imported for it; `Trainer.train`, `Accelerator.save_state` and `load_state` are
extended once they are there, and do for models without adapters what they always did.
"""

from __future__ import annotations

from adapters._attach import swap as _classes
from adapters._late import when_imported
from adapters._trainers.complete import newest_checkpoint
from adapters._trainers.fused import refuse_unseen_head

__all__ = ["newest_checkpoint"]


def _trainer() -> None:
    from adapters._trainers.trainer import extend

    extend()


def _accelerator() -> None:
    from adapters._trainers.accelerator import extend

    extend()


_classes.before_forward.append(refuse_unseen_head)
when_imported("transformers.trainer", _trainer)
when_imported("accelerate.accelerator", _accelerator)
