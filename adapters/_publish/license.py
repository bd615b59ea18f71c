"""The licence of a base: what a published adapter has to respect."""

from __future__ import annotations

from adapters._errors import AdapterError
from adapters._hub.pins import MODELS


def license_of(base: str) -> str:
    """The licence of a base: of an embedded model its pin's, else what its card on the Hub says.

    Raises:
        AdapterError: none is known.
    """
    if base in MODELS:
        return MODELS[base].license.lower()
    try:
        from huggingface_hub import model_info

        card = model_info(base).card_data
        found = card.get("license") if card is not None else None
    except Exception as error:  # the Hub's client has a dozen kinds
        raise AdapterError(
            f"the licence of the base {base} could not be asked for ({type(error).__name__}): give it with "
            "base_license=."
        ) from error
    if not found:
        raise AdapterError(f"the base {base} states no licence on the Hub: ask its authors, or give base_license=.")
    return str(found)
