"""The reasons for which a method may be refused, each looked at by hand, and why it is no defect."""

from __future__ import annotations

import re

REVIEWED = {
    r"nothing in this model can be quantised": "bitsandbytes stores matrices; the weights here are convolutions, or "
    "are rounded by the model itself (I-BERT), and no code could read them in 4 bits",
    r"has no keyvalue or layer site": "nothing here attends, and no layer has one position for each token: a "
    "convolutional network has nowhere to put a prefix",
    r"no prefix can be carried": "scores of a window and of global tokens are joined before the softmax, so a prefix "
    "would reach one part of them only",
    r"times in one forward": "tokens and n-grams (ProphetNet), or a window and global tokens (Longformer), attend in "
    "one module, and to different keys",
    r"no token meets another": "MRA attends in a CUDA kernel; without it transformers returns zeros: no tokens meet",
    r"virtual ones before them": "the positions are a product of two short axes, which together must be as long as "
    "the input, so no token can be put before it",
    r"has no stream site": "no block adds what it computes to what it was given: there is no residual stream",
    r"ia3 accepts none": "IA3 is defined for keys, values and the last weight of a feed-forward, which a convolutional "
    "network does not have",
    r"reads what a branch is given, which is at hand at no branch": "a parallel adapter reads the input of a branch, "
    "which here changes its shape on the way, so it is not the width of the output",
}


def reviewed(reason: str) -> str:
    """Why a refusal for this reason is right; empty for one that nobody has looked at."""
    return next((why for pattern, why in REVIEWED.items() if re.search(pattern, reason)), "")
