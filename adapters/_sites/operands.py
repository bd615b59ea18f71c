"""What torch functions do with their operands, as far as finding sites needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PRODUCTS = words(
    "linear matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm mv addmv inner einsum tensordot bilinear grouped_mm "
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d scaled_dot_product_attention"
)
SUMS = words("add __add__ __radd__ add_ __iadd__")
TIMES = words("mul __mul__ __rmul__ mul_ __imul__ multiply")
COPIES = words("dropout to float half bfloat16 type type_as contiguous clone")
VIEWS = words("view reshape flatten unflatten squeeze unsqueeze expand view_as __get__") | COPIES
NARROWS = words("chunk split split_with_sizes tensor_split unbind __getitem__ narrow select tensor_chunk")
CURVES = words(
    "silu gelu relu relu_ relu6 sigmoid tanh softplus exp erf pow __pow__ square mish elu celu selu leaky_relu prelu "
    "hardswish hardsigmoid hardtanh logsigmoid softmax threshold xielu"
)
SOFTMAXES = words("softmax log_softmax exp")  # hashing attention normalises by hand
PICKS = words("__getitem__ index_select gather take_along_dim index")
CHOICES = words("topk argmax sort argsort kthvalue multinomial")
TOKEN_MIXES = words("conv1d cumsum fft_fft fft_fft2 fft_fftn fft_rfft avg_pool2d roll segsum")
_TRANSPOSES = words("t transpose swapaxes swapdims permute movedim adjoint __get__ numpy_T")


def operation(func: Callable[..., Any]) -> str:
    """A torch function's bare name: `linear`, `__matmul__`; the several grouped products are one operation."""
    if "grouped_mm" in str(func):
        return "grouped_mm"
    name = str(getattr(func, "__name__", func))
    return name if name.startswith("_") else name.split(".")[0]


def same_object(op: str, made: Tensor, operands: list[Tensor]) -> bool:
    """Whether a conversion had nothing to convert, so that the value is the one it was."""
    return op in VIEWS and any(made is t for t in operands)


def reverses(op: str, before: Tensor, after: Tensor) -> bool:
    """Whether a transposition swapped the last two axes; strides tell, whatever its arguments were."""
    if op not in _TRANSPOSES or before.dim() < 2 or before.dim() != after.dim():
        return False
    return before.stride()[-2:] == after.stride()[:-3:-1] and before.shape[-2:] == after.shape[:-3:-1]


def inner_axis(op: str, args: tuple[Any, ...], weight: Tensor, position: int) -> int | None:
    """The axis of the operand `weight` that a product sums over, -1 or -2; None where the call does not tell."""
    if op in ("linear", "inner"):
        return -1
    if op in ("einsum", "tensordot", "bilinear") or op.startswith("conv"):
        return _einsum_axis(args, position) if op == "einsum" else None
    left = {"__rmatmul__": 1, "addmm": 1, "baddbmm": 1, "addmv": 1}.get(op, 0)
    return -1 if position == left else -2


def _einsum_axis(args: tuple[Any, ...], position: int) -> int | None:
    if not args or not isinstance(args[0], str) or "->" not in args[0]:
        return None
    terms, _, kept = args[0].replace(" ", "").partition("->")
    letters = terms.split(",")[position]
    summed = [i - len(letters) for i, letter in enumerate(letters) if letter not in kept]
    return summed[0] if len(summed) == 1 and summed[0] in (-1, -2) else None
