"""The tasks against the benchmark's published rules, counts and rows."""

from __future__ import annotations

import json
import math

import pytest

from adapters._errors import AdapterError
from adapters.data import Call, answer, encode, instruction, paired_interval, score

FUNCTION = {
    "name": "geo.area",
    "description": "Area of a\nshape.",
    "parameters": {
        "type": "dict",
        "properties": {
            "shape": {"type": "string", "description": "Its name."},
            "sides": {"type": "array", "items": {"type": "float"}, "description": "Lengths."},
            "unit": {"type": "string", "description": "Unit."},
            "exact": {"type": "boolean", "description": "Whether to be exact."},
        },
        "required": ["shape", "sides"],
    },
}
ACCEPTED = {
    "shape": ["right triangle", "triangle"],
    "sides": [[3.0, 4.0, 5.5]],
    "unit": ["", "cm", "centimetres"],
    "exact": ["", True],
}
CALL = Call("row", "What is the area of a right triangle with sides 3, 4 and 5.5 cm?", FUNCTION, ACCEPTED)


def said(name: str = "geo.area", **arguments: object) -> str:
    return json.dumps({"name": name, "arguments": arguments})


@pytest.mark.parametrize(
    ("text", "valid", "complete", "exact"),
    [
        (said(shape="right triangle", sides=[3.0, 4.0, 5.5]), True, True, True),
        (
            said(shape="Right-Triangle", sides=[3, 4, 5.5], unit="CM"),
            True,
            True,
            True,
        ),  # case, punctuation, whole numbers
        (" " + said(shape="triangle", sides=[3, 4, 5.5], exact=True) + "\n", True, True, True),
        (said(shape="triangle", sides=[3, 4, 5]), True, True, False),  # another value
        (said(shape="triangle", sides=[4, 3, 5.5]), True, True, False),  # another order
        (said(shape="triangle", sides=[3, 4, 5.5], exact=False), True, True, False),
        (said(shape="triangle", sides=[3, 4, 5.5], exact=1), True, False, False),  # 1 == True, but it is no boolean
        (said(shape="triangle", sides=[3, 4, 5.5], unit="m"), True, True, False),
        (said(shape="triangle"), True, False, False),  # a required argument is missing
        (said(shape="triangle", sides=[3, 4, 5.5], size=3), False, False, False),  # an argument that does not exist
        (said(shape="triangle", sides="3, 4, 5.5"), True, False, False),
        (said(shape=["triangle"], sides=[3, 4, 5.5]), True, False, False),
        (said("geo.areas", shape="triangle", sides=[3, 4, 5.5]), False, False, False),
        (said(shape="triangle", sides=[3, 4, 5.5])[:-1], False, False, False),  # cut off
        ("Sure: " + said(shape="triangle", sides=[3, 4, 5.5]), False, False, False),
        ('{"name": "geo.area"}', False, False, False),
        ("[]", False, False, False),
        ("", False, False, False),
        ("[" * 100_000, False, False, False),
    ],
)
def test_scores_by_hand(text: str, valid: bool, complete: bool, exact: bool) -> None:
    found = score(text, CALL)
    assert (found.valid, found.complete, found.exact) == (valid, complete, exact)


def test_an_argument_that_must_not_be_left_out() -> None:
    call = Call("row", "", FUNCTION, {**ACCEPTED, "unit": ["cm"]})
    assert score(said(shape="triangle", sides=[3, 4, 5.5]), call).exact is False
    assert score(said(shape="triangle", sides=[3, 4, 5.5], unit="cm"), call).exact is True


def test_accepted_values_inside_dictionaries() -> None:
    function = {"name": "f", "parameters": {"properties": {"where": {"type": "dict"}}, "required": ["where"]}}
    call = Call("row", "", function, {"where": [{"city": ["Rome", "Roma"], "zip": ["", "00100"]}]})
    assert score(said("f", where={"city": "roma"}), call).exact
    assert not score(said("f", where={"city": "Paris"}), call).exact
    assert not score(said("f", where={"city": "Rome", "street": "x"}), call).exact
    assert not score(said("f", where={"zip": "00100"}), call).exact


def test_the_reference_answer_gives_what_the_request_states() -> None:
    assert json.loads(answer(CALL)) == {
        "name": "geo.area",
        "arguments": {"shape": "right triangle", "sides": [3.0, 4.0, 5.5], "unit": "cm"},
    }
    silent = Call("row", "What is the area of a right triangle with sides 3, 4 and 5.5?", FUNCTION, ACCEPTED)
    assert "unit" not in json.loads(answer(silent))["arguments"]


def test_the_instruction_has_one_line_a_parameter() -> None:
    lines = instruction(CALL).split("\n")
    assert lines[:3] == [
        "geo.area: Area of a shape.",
        "- shape (string): Its name.",
        "- sides (array of float): Lengths.",
    ]
    assert lines[3] == "- unit (string, optional): Unit."
    assert lines[-2:] == ["", CALL.request]


def test_the_interval_against_the_normal_approximation() -> None:
    base = [i % 10 == 0 for i in range(400)]
    adapted = [i % 10 < 5 for i in range(400)]  # 40 % of the rows become right, none wrong
    low, high = paired_interval(base, adapted)
    error = 1.96 * math.sqrt(0.4 * 0.6 / 400)
    assert low == pytest.approx(0.4 - error, abs=0.006)
    assert high == pytest.approx(0.4 + error, abs=0.006)
    assert (low, high) == paired_interval(base, adapted)  # seeded
    same = paired_interval(base, base)
    assert same == (0.0, 0.0)  # paired: equal answers leave no doubt


def test_an_interval_needs_pairs() -> None:
    with pytest.raises(AdapterError, match="found 2 and 1"):
        paired_interval([True, False], [True])


class Letters:
    """A tokenizer of single letters whose padding token ends the turn, as SmolLM2's does."""

    chat_template = "yes"
    eos_token_id = pad_token_id = 0

    def apply_chat_template(self, turns: list[dict[str, str]], **kwargs: object) -> str:
        return "".join(turn["content"] for turn in turns) + ">"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_labels_are_the_answer_and_the_end_of_the_turn() -> None:
    encoded = encode(Letters(), [{"role": "user", "content": "hi"}], "yo")
    assert encoded.input_ids == [*map(ord, "hi>yo"), 0]
    assert encoded.labels == [-100, -100, -100, ord("y"), ord("o"), 0]


def test_a_base_without_chat_template_is_refused() -> None:
    class Plain(Letters):
        chat_template = None  # type: ignore[assignment]

    with pytest.raises(AdapterError, match="no chat template"):
        encode(Plain(), [{"role": "user", "content": "hi"}], "yo")


@pytest.mark.real
def test_the_split_of_function_calls() -> None:
    from adapters.data import read_calls

    training, held_out = read_calls()
    assert (len(training), len(held_out)) == (1831, 80)
    assert not {row.name for row in training} & {row.name for row in held_out}
    assert not {row.request for row in training} & {row.request for row in held_out}
    assert all(row.id.startswith("simple_python") for row in held_out)
    assert [row.id for row in held_out] == [row.id for row in read_calls()[1]]
    # the benchmark itself accepts all but a few of the answers that are taught, by its own contradictions
    assert sum(not score(answer(row), row).exact for row in training + held_out) <= 6
    assert all(score(answer(row), row).exact for row in held_out)
    with pytest.raises(AdapterError, match="between 1 and"):
        read_calls(held_out=1000)


@pytest.mark.real
def test_one_row_in_tokens() -> None:
    import adapters
    from adapters.data import encode_call, read_calls

    _, tokenizer = adapters.load_base("smollm2-135m-instruct")
    (row,) = [row for row in read_calls()[0] if row.id == "simple_python_0"]
    encoded = encode_call(tokenizer, row)
    learned = [label for label in encoded.labels if label != -100]
    text = tokenizer.decode(encoded.input_ids)
    assert text.startswith("<|im_start|>system\nAnswer with one JSON function call")
    assert text.endswith(
        "<|im_end|>\n<|im_start|>assistant\n"
        '{"name": "calculate_triangle_area", "arguments": {"base": 10, "height": 5, "unit": "units"}}<|im_end|>'
    )
    assert text.count("<|im_end|>") == 3
    assert encoded.input_ids[-len(learned) :] == learned
    assert learned[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert encoded.labels.count(-100) == len(encoded.labels) - len(learned)


@pytest.mark.real
def test_the_split_of_headlines() -> None:
    from adapters.data import read_headlines
    from adapters.data.scoring import plain

    training, held_out = read_headlines()
    assert len(held_out) == 2000
    assert 28_000 < len(training) + len(held_out) <= 28_614
    texts = [plain(row.text) for row in training + held_out]
    assert len(set(texts)) == len(texts)
    assert {row.label for row in training} == {0, 1}
    assert 0.4 < sum(row.label for row in held_out) / 2000 < 0.6
    assert held_out == read_headlines()[1]
