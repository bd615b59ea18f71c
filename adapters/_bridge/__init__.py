"""Makes an attached model a `PeftModel` wherever one is asked for, as the same object with the same keys.

Nothing of it is imported before peft is. From then on the class of every attached root also has `PeftModel` among its
ancestors, every public member of which is answered in `face`.
"""

from __future__ import annotations

from adapters._bridge.adopting import adopt
from adapters._bridge.settings import peft_config
from adapters._late import when_imported

__all__ = ["adopt", "peft_config"]


def _connect() -> None:
    from adapters._bridge.mapping import connect

    connect()


when_imported("peft", _connect)
