"""Every shape of rows, token by token on SmolLM2's tokenizer, and what is recognised, dropped and refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
from chat import CHATML, letters

from adapters._errors import AdapterError
from adapters.data import prepare

real = pytest.mark.real
END = "<|im_end|> Ċ"
SYSTEM = f"<|im_start|> system Ċ Be Ġbrief . {END}"
# the template's own system turn, where a row has none
DEFAULT = (
    f"<|im_start|> system Ċ You Ġare Ġa Ġhelpful ĠAI Ġassistant Ġnamed ĠSm ol LM , Ġtrained Ġby ĠH ugging ĠFace {END}"
)
USER = "<|im_start|> user Ċ"
ASSISTANT = "<|im_start|> ass istant Ċ"


@cache
def smollm() -> Any:
    from transformers import AutoTokenizer

    from adapters._hub import fetch

    return AutoTokenizer.from_pretrained(fetch("smollm2-135m-instruct"))


def tokens(*parts: str) -> list[tuple[str, bool]]:
    """Context and learned tokens in turns, separated by spaces; Ġ is a space and Ċ a line break."""
    return [(token, i % 2 == 1) for i, part in enumerate(parts) for token in part.split()]


def learned(rows: Any, tokenizer: Any = None, **options: Any) -> list[tuple[str, bool]]:
    """The tokens of the only row, each with whether it is learned."""
    tokenizer = tokenizer or smollm()
    prepared = prepare(rows, tokenizer, **options)
    assert prepared.dataset.column_names == ["input_ids", "labels"]
    (row,) = prepared.dataset
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    texts = tokenizer.convert_ids_to_tokens(row["input_ids"])
    return [(text, label != -100) for text, label in zip(texts, row["labels"], strict=True)]


ASKED = f"{USER} Capital Ġof ĠFrance ? {END} {ASSISTANT}"
ONE_TURN = tokens(f"{DEFAULT} {ASKED}", "Paris <|im_end|>", "Ċ")


@real
def test_alpaca() -> None:
    row = {"instruction": "Capital of France?", "input": "", "output": "Paris", "text": "Below is ..."}
    assert learned([row]) == ONE_TURN
    with_input = {"instruction": "Name the capital.", "input": "France", "output": "Paris", "system": "Be brief."}
    assert learned([with_input]) == tokens(
        f"{SYSTEM} {USER} Name Ġthe Ġcapital . Ċ Ċ France {END} {ASSISTANT}", "Paris <|im_end|>", "Ċ"
    )


@real
def test_alpaca_without_template() -> None:
    row = {"instruction": "Name it.", "input": "x", "output": "Paris"}
    found = learned([row], use_template=False)
    assert [token for token, on in found if on] == ["Paris", "<|im_end|>"]
    ids = smollm().convert_tokens_to_ids([token for token, _ in found])
    assert smollm().decode(ids) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nName it.\n\n### Input:\nx\n\n"
        "### Response:\nParis<|im_end|>"
    )


TWO_TURNS = tokens(
    f"{SYSTEM} {ASKED}", "Paris <|im_end|>", f"Ċ {USER} And Ġof ĠItaly ? {END} {ASSISTANT}", "Rome <|im_end|>", "Ċ"
)
TALK = [
    ("system", "Be brief."),
    ("user", "Capital of France?"),
    ("assistant", "Paris"),
    ("user", "And of Italy?"),
    ("assistant", "Rome"),
]


def sharegpt(**names: str) -> list[dict[str, str]]:
    return [{"from": names.get(role, role), "value": text} for role, text in TALK]


def turns() -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in TALK]


@real
def test_sharegpt() -> None:
    assert learned([{"conversations": sharegpt(user="human", assistant="gpt")}]) == TWO_TURNS
    rows = [{"conversations": sharegpt(user="human", assistant="gpt")[1:], "system": "Be brief."}]
    assert learned(rows) == TWO_TURNS


@real
@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
def test_messages(column: str) -> None:
    assert learned([{column: turns()}]) == TWO_TURNS
    assert learned([{column: turns()[1:]}], system="Be brief.") == TWO_TURNS
    assert learned([{column: turns()}], system="Be long.") == TWO_TURNS  # a system turn of the row is kept


@real
def test_only_the_last_answer() -> None:
    first, paris, then, rome, rest = (
        f"{SYSTEM} {ASKED}",
        "Paris <|im_end|>",
        f"Ċ {USER} And Ġof ĠItaly ? {END} {ASSISTANT}",
        "Rome <|im_end|>",
        "Ċ",
    )
    assert learned([{"messages": turns()}], learn="last") == tokens(f"{first} {paris} {then}", rome, rest)


@real
def test_ultrachat() -> None:
    asked = {"prompt": "Capital of France?", "prompt_id": "f0e1", "messages": turns()}
    assert learned([asked]) == TWO_TURNS
    raw = {"id": "0", "data": [text for _, text in TALK[1:]]}
    assert learned([raw], system="Be brief.") == TWO_TURNS


@real
def test_prompt_and_completion() -> None:
    assert learned([{"prompt": "Capital of France?", "completion": "Paris"}]) == ONE_TURN
    assert learned([{"prompt": "The sky is", "completion": " blue"}], use_template=False) == tokens(
        "The Ġsky Ġis", "Ġblue <|im_end|>"
    )
    assert learned([{"prompt": "Sky?", "completion": "Blue"}], use_template=False) == tokens(
        "Sky ? Ċ", "Blue <|im_end|>"
    )


@real
def test_prompt_and_completion_as_messages() -> None:
    """The answer inside the prompt is context."""
    rows = [{"prompt": turns()[:4], "completion": turns()[4:]}]
    context = f"{SYSTEM} {ASKED} Paris <|im_end|> Ċ {USER} And Ġof ĠItaly ? {END} {ASSISTANT}"
    assert learned(rows) == tokens(context, "Rome <|im_end|>", "Ċ")


@real
@pytest.mark.parametrize(("ask", "reply"), [("question", "answer"), ("query", "response"), ("instruction", "response")])
def test_question_and_answer(ask: str, reply: str) -> None:
    assert learned([{ask: "Capital of France?", reply: "Paris"}]) == ONE_TURN


@real
def test_question_with_context() -> None:
    row = {"context": "A list.", "question": "Capital?", "answer": "Paris"}
    assert learned([row], use_template=False) == tokens(
        "Context : ĠA Ġlist . Ċ Question : ĠCapital ? Ċ Answer :", "ĠParis <|im_end|>"
    )


@real
def test_question_with_context_through_the_template() -> None:
    row = {"context": "A list.", "question": "Capital of France?", "answer": "Paris"}
    asked = ASKED.replace("Capital", "A Ġlist . Ċ Ċ Capital")
    assert learned([row]) == tokens(f"{DEFAULT} {asked}", "Paris <|im_end|>", "Ċ")


@real
def test_text() -> None:
    assert learned([{"text": "The sky is blue."}]) == tokens("", "The Ġsky Ġis Ġblue . <|im_end|>")
    assert learned([{"text": "Blue.<|im_end|>"}]) == tokens("", "Blue . <|im_end|>")  # its end is not doubled


@real
def test_finished_rows() -> None:
    ids = smollm().convert_tokens_to_ids(["Sky", "?", "Blue", "<|im_end|>"])
    row = {"input_ids": ids, "labels": [-100, -100, *ids[2:]], "attention_mask": [1, 1, 1, 1]}
    assert learned([row]) == tokens("Sky ?", "Blue <|im_end|>")


@real
def test_tools() -> None:
    """A template with tools: the call is learned, what the tool says is not."""
    tokenizer = letters(
        CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m.tool_calls | tojson if m.tool_calls }}")
    )
    tokenizer.chat_template = "{% if tools %}[{{ tools | map(attribute='name') | join(',') }}]{% endif %}" + (
        tokenizer.chat_template
    )
    call = {"function": {"name": "add", "arguments": '{"a": 2}'}}
    talk = [
        {"role": "user", "content": "2+3?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_calls": None},
        {"role": "assistant", "content": "It is 5.", "tool_calls": None},
    ]
    for tools in ([{"name": "add"}], json.dumps([{"name": "add"}])):
        prepared = prepare([{"messages": talk, "tools": tools}], tokenizer)
        (row,) = prepared.dataset
        said = [tokenizer.decode([label]) for label in row["labels"] if label != -100]
        assert "".join(said) == '[{"function": {"name": "add", "arguments": {"a": 2}}}]<|im_end|>It is 5.<|im_end|>'
        assert tokenizer.decode(row["input_ids"]).startswith("[add]<|im_start|>user")
    with pytest.raises(AdapterError, match="does not write the call of 'add'"):
        prepare([{"messages": talk}], letters(CHATML))
    with pytest.raises(AdapterError, match="row 0 has tools, but the chat template does not write them"):
        prepare([{"messages": talk[:1] + talk[3:], "tools": [{"name": "add"}]}], letters(CHATML))


ROWS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(7)]


def test_every_kind_of_source(tmp_path: Path) -> None:
    tokenizer = letters(CHATML)
    expected = prepare(ROWS, tokenizer).dataset.to_list()
    data = datasets.Dataset.from_list(ROWS)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    data.to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.csv").write_text("question,answer\n" + "\n".join(f"{r['question']},x{r['answer']}" for r in ROWS))
    for source in (data, data.with_format("torch"), iter(ROWS), tuple(ROWS), tmp_path / "a.jsonl", tmp_path / "a.json"):
        assert prepare(source, tokenizer).dataset.to_list() == expected
    assert prepare(str(tmp_path / "a.parquet"), tokenizer).dataset.to_list() == expected
    text = [{**row, "answer": f"x{row['answer']}"} for row in ROWS]
    assert prepare(tmp_path / "a.csv", tokenizer).dataset.to_list() == prepare(text, tokenizer).dataset.to_list()


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.json", "[]", "a.json holds no rows"),
        ("a.csv", "question,answer\n", "a.csv holds no rows"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", '{"a": 1\n', "a.jsonl cannot be read: JSON parse error"),
    ],
)
def test_files_without_rows(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(AdapterError, match=sentence):
        prepare(tmp_path / name, letters(CHATML))


def test_numbers_are_taken_as_text_and_reported() -> None:
    prepared = prepare([{"question": "6*7?", "answer": 42}], letters(CHATML))
    assert (
        prepared.dataset.to_list() == prepare([{"question": "6*7?", "answer": "42"}], letters(CHATML)).dataset.to_list()
    )
    assert "a number in 'answer' was taken as text (1 rows)" in str(prepared.report)


def test_columns_by_hand() -> None:
    rows = [{"text": "2+3?", "reply": "5", "answer": "not this", "messages": []}]
    prepared = prepare(rows, letters(CHATML), columns={"question": "text", "answer": "reply"})
    expected = prepare([{"question": "2+3?", "answer": "5"}], letters(CHATML))
    assert prepared.dataset.to_list() == expected.dataset.to_list()
    assert prepared.report.columns == {"question": "text", "answer": "reply"}
    assert prepared.report.unused == ("answer", "messages")


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ({"user": "Human", "assistant": "GPT"}, {}),
        ({"user": "alice", "assistant": "bob"}, {}),  # they take turns, alice begins and bob ends
        ({"user": "human", "assistant": "bob"}, {}),
        ({"user": "bob", "assistant": "alice"}, {"roles": {"bob": "user", "alice": "assistant"}}),
        ({"user": "gpt", "assistant": "human"}, {"roles": {"gpt": "user", "human": "assistant"}}),
    ],
)
def test_names_of_roles(names: dict[str, str], options: dict[str, Any]) -> None:
    rows = [{"conversations": sharegpt(**names)}, {"conversations": sharegpt(**names)[:3]}]
    prepared = prepare(rows, letters(CHATML), **options)
    plain = prepare([{"messages": turns()}, {"messages": turns()[:3]}], letters(CHATML))
    assert prepared.dataset.to_list() == plain.dataset.to_list()
    assert prepared.report.roles == {said: role for role, said in names.items()}
    assert f"{names['assistant']} -> assistant" in str(prepared.report)


def said(*names: str) -> dict[str, Any]:
    return {"conversations": [{"from": name, "value": f"{name} {i}"} for i, name in enumerate(names)]}


@pytest.mark.parametrize(
    "rows",
    [
        [said("a", "b"), said("b", "a")],  # who begins changes
        [said("a", "b", "a")],  # who begins also ends
        [said("a", "b", "c", "b")],
        [said("a", "a", "b")],
        [said("gpt", "b")],  # a known role speaks where it cannot
    ],
)
def test_unclear_roles_are_refused(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(AdapterError, match=r"could be read in several ways; .*roles=\{'[ab]': 'user'"):
        prepare(rows, letters(CHATML))


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        ([], {}, "there are no rows"),
        ([{"a": "x", "b": 1}], {}, r"columns a \(str\), b \(int\); map them by hand, .*Shapes: finished .*alpaca"),
        ([{"prompt": "x", "chosen": "a", "rejected": "b"}], {}, "preferences"),
        (["x"], {}, "row 0 is a str, expected a mapping"),
        ({"train": ROWS}, {}, "a mapping of train; pass one"),
        (7, {}, "rows is a int"),
        ("rows.xml", {}, "no file of rows; expected one ending in .jsonl"),
        ("rows.csv", {}, "there is no file rows.csv"),
        ([*ROWS[:2], {"messages": turns()}], {}, "row 2 has the shape messages .*, other rows have question/answer"),
        ([*ROWS[:2], {"question": "x"}], {}, "row 2 has no answer, which the shape question/answer"),
        (
            [{"conversations": turns()}, {"conversations": sharegpt()}],
            {},
            "row 1 has the shape sharegpt .*, other rows have messages",
        ),
        (
            [{"messages": [{"content": "x", "role": "user"}, {"content": "y"}]}],
            {},
            r"row 0: messages\[1\] says no role",
        ),
        (
            [{"prompt": "x", "completion": "y"}, {"prompt": turns()[:2], "completion": turns()[2:3]}],
            {},
            r"row 1 has the shape prompt/completion of turns .*, other rows have prompt/completion",
        ),
        ([{"question": "x", "answer": ["y"]}], {}, "row 0: column 'answer' holds list, expected text"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], {}, "holds more than text"),
        (ROWS, {"columns": {"questoin": "a"}}, "no field 'questoin'; did you mean 'question'"),
        (ROWS, {"columns": {"question": "questio"}}, "no column; did you mean 'question'"),
        (ROWS, {"learn": "lst"}, "learn is 'lst'; did you mean 'last'"),
        (ROWS, {"too_long": "crop"}, "too_long is 'crop'"),
        (ROWS, {"max_tokens": 0}, "max_tokens is 0"),
        ([{"messages": turns()}], {"roles": {"user": "asistant"}}, "did you mean 'assistant'"),
        (
            [{"messages": turns()}],
            {"roles": {"usr": "user"}},
            "no row has; the roles there are system, user, assistant",
        ),
        ([{"text": "x"}], {"system": "Be brief."}, "system is for conversations, and these rows have the shape text"),
        ([{"input_ids": [5, 6], "labels": [5]}], {}, "row 0 has 2 input_ids and 1 labels"),
        ([{"input_ids": [5, 6], "labels": [6, -100]}], {}, r"labels\[0\] is 6, expected -100 or 5"),
        ([{"input_ids": [5, 9999], "labels": [5, 9999]}], {}, r"input_ids\[1\] is 9999"),
        ([{"input_ids": [5, 6], "labels": [-100, -100]}], {}, "nothing to learn in these 1 rows: 1 no label"),
        ([{"question": "x", "answer": ""}, {"question": "", "answer": "x"}], {}, "1 empty answer; 1 empty question"),
        ([{"messages": turns()[:2]}], {}, "1 no answer of an assistant"),
    ],
)
def test_refusals(rows: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AdapterError, match=sentence):
        prepare(rows, letters(CHATML), **options)


def test_mixed_rows_of_one_arrow_table_are_refused() -> None:
    """Arrow fills the columns of the other shape with None."""
    rows = [{**ROWS[0], "messages": None}, {"question": None, "answer": None, "messages": turns()}]
    mixed = datasets.Dataset.from_list(rows)
    with pytest.raises(AdapterError, match=r"row 0 has the shape question/answer .*, other rows have messages"):
        prepare(mixed, letters(CHATML))


def test_dropped_rows_are_counted_by_reason() -> None:
    rows = [
        {"messages": turns()},
        {"messages": turns()[:2]},
        {"messages": []},
        {"messages": [*turns()[:2], {"role": "assistant", "content": " "}]},
        {"messages": [*turns()[1:], {"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "y"}]},
        {"messages": None},
    ]
    report = prepare(rows, letters(CHATML), max_tokens=400).report
    assert (report.rows, report.kept, report.cut) == (6, 1, 0)
    assert report.dropped == {"no answer of an assistant": 3, "empty answer": 1, "longer than 400 tokens": 1}
    assert "6 read, 1 kept, 0 cut, 5 dropped" in str(report)
    assert "dropped 3: no answer of an assistant" in str(report)


def test_an_empty_cell_is_no_other_shape() -> None:
    rows = [{"question": "x", "answer": None, "text": "x"}, {"question": "x", "answer": "y", "text": "xy"}]
    report = prepare(rows, letters(CHATML)).report
    assert (report.shape, report.unused, dict(report.dropped)) == ("question/answer", ("text",), {"empty answer": 1})


def test_a_column_that_is_empty_in_every_row_decides_nothing() -> None:
    report = prepare([{**row, "messages": None, "prompt": []} for row in ROWS], letters(CHATML)).report
    assert (report.shape, report.kept) == ("question/answer", 7)


def test_answers_in_a_prompt_stay_context_when_a_system_turn_is_added() -> None:
    row = {"prompt": turns()[1:3], "completion": turns()[3:]}
    tokenizer = letters(CHATML)
    (found,) = prepare([row], tokenizer, system="Be brief.").dataset
    assert tokenizer.decode([label for label in found["labels"] if label != -100]) == "Rome<|im_end|>"


def generated() -> Iterator[dict[str, str]]:
    yield from ROWS


def test_preparing_is_deterministic_and_rows_stay_in_order() -> None:
    tokenizer = letters(CHATML)
    many = [{"question": f"number {i}", "answer": str(i)} for i in range(1200)]  # enough to show progress
    prepared = prepare(many, tokenizer)
    answers = [tokenizer.decode([t for t in row["labels"] if t != -100]) for row in prepared.dataset]
    assert answers == [f"{i}<|im_end|>" for i in range(1200)]
    assert prepared.report.lengths == tuple(map(len, prepared.dataset["input_ids"]))
    assert prepare(generated(), tokenizer).dataset.to_list() == prepare(ROWS, tokenizer).dataset.to_list()
