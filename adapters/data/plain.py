"""Prompt and answer as plain text, for tokenizers without a chat template."""

from __future__ import annotations

from collections.abc import Callable

Form = Callable[[str, str, str], tuple[str, str]]  # request, material beside it, answer -> prompt, answer


def alpaca(request: str, material: str, answer: str) -> tuple[str, str]:
    """The format of Stanford Alpaca (Taori et al., 2023), in which most models of this shape were trained."""
    if material.strip():
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{request}\n\n### Input:\n{material}\n\n### Response:\n",
            answer,
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{request}\n\n### Response:\n",
        answer,
    )


def question(request: str, material: str, answer: str) -> tuple[str, str]:
    """`Question: ...`, a line with `Answer:`, and the answer after a space that belongs to the answer.

    >>> question("2 + 3?", "", "5")
    ('Question: 2 + 3?\\nAnswer:', ' 5')
    """
    context = f"Context: {material}\n" if material.strip() else ""
    return f"{context}Question: {request}\nAnswer:", f" {answer.lstrip(' ')}"


def continued(request: str, material: str, answer: str) -> tuple[str, str]:
    """The answer right after the prompt, with a line break where neither side has white space there.

    >>> continued("The sky is", "", " blue."), continued("2 + 3?", "", "5")
    (('The sky is', ' blue.'), ('2 + 3?\\n', '5'))
    """
    apart = request[-1:].isspace() or answer[:1].isspace()
    return request if apart else f"{request}\n", answer


def with_system(system: str, written: tuple[str, str]) -> tuple[str, str]:
    """A system prompt as the first paragraph."""
    return (f"{system}\n\n{written[0]}", written[1]) if system.strip() else written
