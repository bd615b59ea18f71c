"""Chat templates as found in the field: where an answer begins and ends, what is proved and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from chat import CHATML, ENDLESS, GEMMA, LLAMA2, PHI3, THINKING, letters, words
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters._errors import AdapterError
from adapters.data import encode_prompt, prepare


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [turn("user", "hi"), turn("assistant", "yo"), turn("user", "and?"), turn("assistant", "well")]


def spans(tokenizer: Any, talk: Any, **options: Any) -> list[tuple[str, bool]]:
    """The text of the only row in stretches that are learned or not."""
    rows = talk if isinstance(talk[0], dict) and "role" not in talk[0] else [{"messages": talk}]
    (row,) = prepare(rows, tokenizer, **options).dataset
    found: list[tuple[list[int], bool]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if not found or found[-1][1] != (label != -100):
            found.append(([], label != -100))
        found[-1][0].append(token)
    return [(tokenizer.decode(ids), learned) for ids, learned in found]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            CHATML,
            [
                ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
                ("yo<|im_end|>", True),
                ("\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n", False),
                ("well<|im_end|>", True),
                ("\n", False),
            ],
        ),
        (
            LLAMA2,
            [
                ("<s>[INST] hi [/INST]", False),
                (" yo </s>", True),
                ("<s>[INST] and? [/INST]", False),
                (" well </s>", True),
            ],
        ),
        (
            GEMMA,
            [
                ("<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n", False),
                ("yo<end_of_turn>", True),
                ("\n<start_of_turn>user\nand?<end_of_turn>\n<start_of_turn>model\n", False),
                ("well<end_of_turn>", True),
                ("\n", False),
            ],
        ),
        (
            PHI3,
            [
                ("<|user|>\nhi<|end|>\n<|assistant|>\n", False),
                ("yo<|end|>", True),
                ("\n<|user|>\nand?<|end|>\n<|assistant|>\n", False),
                ("well<|end|>", True),
                ("\n<|endoftext|>", False),
            ],
        ),
        (
            ENDLESS,  # the end token is appended
            [
                ("user: hi\nassistant: ", False),
                ("yo</s>", True),
                ("\nuser: and?\nassistant: ", False),
                ("well</s>", True),
                ("\n", False),
            ],
        ),
    ],
    ids=["chatml", "llama2", "gemma", "phi3", "endless"],
)
def test_where_answers_are(template: str, expected: list[tuple[str, bool]]) -> None:
    tokenizer = letters(template)
    assert spans(tokenizer, TALK) == expected
    joined = "".join(text for text, _ in expected[:3])
    if template == ENDLESS:
        joined = joined.replace("</s>", "")  # nothing is appended to an answer that is context
    assert spans(tokenizer, TALK, learn="last") == [(joined, False), *expected[3:]]
    assert spans(tokenizer, TALK, mask_prompt=False) == [("".join(text for text, _ in expected), True)]
    # what the template does to spaces around a content is part of the text that is learned
    padded = [turn(said["role"], f" {said['content']}  ") for said in TALK]
    learned = [text for text, on in spans(tokenizer, padded) if on]
    trims = template in (LLAMA2, GEMMA)
    assert learned == [text if trims else f" {text.replace('<', '  <', 1)}" for text, on in expected if on]


def test_the_report_says_how_a_turn_ends() -> None:
    report = prepare([{"messages": TALK}] * 3, letters(CHATML)).report
    tokenizer = letters(CHATML)
    assert (report.end_of_turn, report.end_of_turn_id) == ("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))
    text = str(report)
    assert f"end of turn: '<|im_end|>' (token {report.end_of_turn_id}) is learned in 3 of 3 rows" in text
    assert "all 6 answers" in text
    assert "'<|im_end|>' is not the tokenizer's end token: generation has to stop at it as well" in text
    assert report.tokens == sum(report.lengths) == 3 * report.longest
    assert report.learned_tokens == sum(report.learned) == 3 * len(["y", "o", "<>", "w", "e", "l", "l", "<>"])
    assert 6 <= len(text.splitlines()) <= 15
    ended = prepare([{"messages": TALK}], letters(CHATML, eos_token="<|im_end|>")).report
    assert "generation has to stop" not in str(ended)
    assert "'</s>' was appended to each" in str(prepare([{"messages": TALK}], letters(ENDLESS)).report)
    assert "begins an answer with ' ', which is learned" in str(prepare([{"messages": TALK}], letters(LLAMA2)).report)


def test_the_end_is_learned_though_it_is_the_padding_token() -> None:
    tokenizer = letters(CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")
    (row,) = prepare([{"messages": TALK}], tokenizer).dataset
    end = tokenizer.pad_token_id
    learned = [label == end for token, label in zip(row["input_ids"], row["labels"], strict=True) if token == end]
    assert learned == [False, True, False, True]  # after the user, the assistant, the user, the assistant


def test_text_that_ends_a_turn_is_no_token_of_its_own() -> None:
    template = CHATML.replace("<|im_end|>", "[end]")
    found = spans(letters(template), TALK)
    assert [text for text, on in found if on] == ["yo[end]</s>", "well[end]</s>"]


def test_thinking_that_later_turns_drop() -> None:
    tokenizer = letters(THINKING)
    with pytest.raises(AdapterError) as refused:
        prepare([{"messages": TALK[:2]}, {"messages": TALK}], tokenizer)
    said = str(refused.value)
    assert said.startswith("row 1: the chat template writes turn 1 differently once more turns follow")
    assert "<think></think>yo<|im_end|>' by itself" in said
    assert "assistant\\nyo<|im_end|>" in said
    assert 'learn="last", which works here' in said
    thoughtful = [
        turn("user", "hi"),
        turn("assistant", "yo"),
        turn("user", "why?"),
        turn("assistant", "<think>hm</think>so"),
    ]
    found = spans(tokenizer, thoughtful, learn="last")
    assert [text for text, on in found if on] == ["<think>hm</think>so<|im_end|>"]
    assert "<think>" not in found[0][0]
    report = prepare([{"messages": TALK}], tokenizer, learn="last").report
    assert "begins an answer with '<think></think>', which is learned" in str(report)


def test_a_history_that_depends_on_the_last_turn() -> None:
    """Where the last prompt does not agree either, learning only the last answer is not suggested."""
    template = "{% if messages | length > 3 %}<s>{% endif %}" + CHATML
    tokenizer = letters("{% if messages[-1]['role'] == 'assistant' and messages | length > 3 %}<s>{% endif %}" + CHATML)
    with pytest.raises(AdapterError, match=r"row 0: .* prompt for turn 1 is not how") as refused:
        prepare([{"messages": TALK}], tokenizer)
    assert "learn=" not in str(refused.value)
    assert "tokenizer.chat_template" in str(refused.value)
    with pytest.raises(AdapterError, match=r"row 0: .* prompt for turn 3 is not how"):
        prepare([{"messages": TALK}], tokenizer, learn="last")
    # a default that comes with the fourth turn, but is in the last prompt already
    with pytest.raises(AdapterError, match='pass learn="last"'):
        prepare([{"messages": [turn("system", "s"), *TALK]}], letters(template))


def test_a_prompt_that_starts_to_think() -> None:
    """The prompt for generation opens the thinking: rows that think agree with it, others are refused."""
    tokenizer = letters(CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"))
    assert spans(tokenizer, [TALK[0], turn("assistant", "<think>hm</think>yo")])[1] == ("hm</think>yo<|im_end|>", True)
    with pytest.raises(AdapterError, match=r"row 0: .* prompt for turn 1 is not how .*<think>' by itself"):
        prepare([{"messages": TALK}], tokenizer)


def test_several_tokens_at_the_end_of_a_turn() -> None:
    """Cohere's answers end in two tokens, of which the last one stops generation."""
    tokenizer = letters(CHATML.replace("<|im_end|>", "<|end|><|im_end|>"))
    assert spans(tokenizer, TALK[:2])[1:] == [("yo<|end|><|im_end|>", True), ("\n", False)]
    assert prepare([{"messages": TALK}], tokenizer).report.end_of_turn == "<|im_end|>"
    # the second one ends the conversation, not a turn
    once = letters(
        CHATML.replace(
            "\n{% endfor %}", "{% if loop.last and not add_generation_prompt %}<|endoftext|>{% endif %}{% endfor %}"
        )
    )
    assert [text for text, on in spans(once, TALK) if on] == ["yo<|im_end|>", "well<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "special", "sentence"),
    [
        ("{% for m in messages %}{{ m['role'] }}<|im_end|>{% endfor %}", {}, "leaves out what is said"),
        (
            "{% for m in messages %}{{ m['content'] }}",
            {},
            "one question and one answer are refused by the chat template",
        ),
        ("{{ messages[0].wrong.field }}", {}, "refused by the chat template .*set tokenizer.chat_template"),
        (
            CHATML.replace("assistant", "model"),
            {},
            r"row 0: .* prompt for turn 1 is not how .*model\\n' by itself, .*assistant.*template_options",
        ),
        (ENDLESS, {"eos_token": None, "pad_token": None}, r"has no end token \(eos_token\)"),
        (None, {"eos_token": None, "pad_token": None}, r"has no end token \(eos_token\)"),
        (None, {}, "row 0 is a conversation, and the tokenizer has no chat template .* instruct version"),
    ],
)
def test_refused_templates(template: str | None, special: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AdapterError, match=sentence):
        prepare([{"messages": TALK}], letters(template, **special))


def test_rows_that_the_template_refuses_are_counted() -> None:
    rows = [{"messages": TALK}, {"messages": [turn("system", "Be brief."), *TALK]}, {"messages": [TALK[0], *TALK]}]
    report = prepare(rows, letters(GEMMA)).report
    assert report.kept == 1
    assert report.dropped == {
        "refused by the chat template (System role not supported)": 1,
        "refused by the chat template (Conversation roles must alternate)": 1,
    }
    with pytest.raises(
        AdapterError, match=r"nothing to learn in these 1 rows: 1 refused by .*System role not supported"
    ):
        prepare(rows[:1], letters(GEMMA), system="Be brief.")


def test_what_comes_before_and_after_is_context() -> None:
    talk = [turn("assistant", "Welcome."), *TALK, turn("user", "bye")]
    found = spans(letters(CHATML), talk)
    assert [text for text, on in found if on] == ["yo<|im_end|>", "well<|im_end|>"]
    assert "Welcome." in found[0][0]
    assert "bye" not in found[-1][0]
    said = str(prepare([{"messages": talk}], letters(CHATML)).report)
    assert "turns after the last answer were left out" in said
    assert "the assistant speaks first" in said


def test_special_tokens_inside_a_text_are_reported() -> None:
    talk = [turn("user", "what is </s>?"), turn("assistant", "an end")]
    assert "holds special tokens" in str(prepare([{"messages": talk}], letters(CHATML)).report)
    assert "holds special tokens" not in str(prepare([{"messages": TALK}], letters(CHATML)).report)


def test_a_system_turn_that_the_template_leaves_out_is_reported() -> None:
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    report = prepare([{"messages": [turn("system", "Be brief."), *TALK]}], letters(template)).report
    assert "leaves out or rewrites a turn of the role system (1 rows)" in str(report)


def test_cut_rows() -> None:
    tokenizer = letters(CHATML)
    (whole,) = prepare([{"messages": TALK}], tokenizer).dataset
    learned = [i for i, label in enumerate(whole["labels"]) if label != -100]
    first = learned[2] + 1  # "y", "o" and the end of the first answer
    other = {"messages": [turn("user", "hi" * 40), turn("assistant", "yo")]}
    prepared = prepare([{"messages": TALK}, other], tokenizer, max_tokens=first, too_long="cut")
    assert prepared.dataset.to_list() == [{key: whole[key][:first] for key in ("input_ids", "labels")}]
    assert (prepared.report.kept, prepared.report.cut, prepared.report.ended) == (1, 1, 1)
    assert prepared.report.dropped == {f"no answer within the first {first} tokens": 1}
    with pytest.raises(AdapterError, match=r"cuts the end of turn off every row, .* never learn to stop"):
        prepare([{"messages": TALK}], tokenizer, max_tokens=first - 1, too_long="cut")
    with pytest.raises(AdapterError, match=r"nothing to learn in these 2 rows: 2 no answer within .*raise max_tokens"):
        prepare([{"messages": TALK}, other], tokenizer, max_tokens=first - 3, too_long="cut")
    with pytest.raises(AdapterError, match=r"2 longer than .* tokens; raise max_tokens"):
        prepare([{"messages": TALK}, other], tokenizer, max_tokens=first)


def test_whole_rows_that_are_learned_need_their_ends_too() -> None:
    report = prepare([{"messages": TALK}], letters(CHATML), mask_prompt=False).report
    assert (report.tokens, report.share, report.learns) == (report.learned_tokens, 1.0, "the whole text")
    assert "all 2 answers" in report.proof
    with pytest.raises(AdapterError, match="cuts the end of turn off every row"):
        prepare([{"messages": TALK}], letters(CHATML), mask_prompt=False, max_tokens=20, too_long="cut")


def bos_first(tokenizer: Any) -> Any:
    """Llama's: `<s>` before every text, unless it is told not to."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def test_the_first_token_is_there_once() -> None:
    assert spans(bos_first(letters(LLAMA2)), TALK)[0] == ("<s>[INST] hi [/INST]", False)
    assert spans(bos_first(letters(CHATML)), TALK)[0][0].startswith("<|im_start|>")  # as apply_chat_template does
    plain = bos_first(letters(None))
    asked = [{"question": "2+3?", "answer": "5"}]
    assert spans(plain, asked) == [("<s>Question: 2+3?\nAnswer:", False), (" 5</s>", True)]
    assert spans(plain, [{"text": "hi"}]) == [("<s>", False), ("hi</s>", True)]
    assert spans(plain, [{"text": "<s>hi</s>"}]) == [("<s>hi</s>", True)]


def test_a_space_that_the_tokenizer_puts_first_is_not_put_before_answers() -> None:
    """SentencePiece's dummy prefix belongs to the start of a text, and an answer is not one."""
    tokenizer = letters(CHATML.replace("<|im_start|>", ">"), prefix=True)
    (row,) = prepare([{"messages": TALK[:2]}], tokenizer).dataset
    answer = [label for label in row["labels"] if label != -100]
    assert tokenizer.convert_ids_to_tokens(answer) == ["y", "o", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"])[:3] == ["▁", ">", "u"]
    assert prepare([{"messages": TALK[:2]}], tokenizer).report.apart == 0


def test_prompts_are_tokens_as_generation_meets_them() -> None:
    """A merge across the end of the prompt is kept out, and the rows with one are counted."""
    template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    )
    template += "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = words(template, ["user:x assistant:yes", "assistant:yes", "assistant:yes user"] * 50)
    together = tokenizer("user:xassistant:yes</s>", add_special_tokens=False)["input_ids"]
    talks = [[turn("user", "x"), turn("assistant", "yes")], [turn("user", "x"), turn("assistant", "42")]]
    prepared = prepare([{"messages": talk} for talk in talks], tokenizer)
    for talk, row in zip(talks, prepared.dataset, strict=True):
        prompt = encode_prompt(tokenizer, talk[:1])
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt)] == [-100] * len(prompt)
        assert -100 not in row["labels"][len(prompt) :]
    assert prepared.dataset[0]["input_ids"] != together
    assert prepared.report.apart == 1
    assert "1 rows would differ as one text" in str(prepared.report)


def test_template_options_reach_the_template() -> None:
    tokenizer = letters("{% if brief %}<s>{% endif %}" + CHATML)
    assert spans(tokenizer, TALK, template_options={"brief": True})[0][0].startswith("<s><|im_start|>")
    assert spans(tokenizer, TALK)[0][0].startswith("<|im_start|>")


CONTENT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
SAID = CONTENT.filter(lambda text: text.strip())


@settings(max_examples=150, deadline=None)
@given(
    system=st.none() | CONTENT,
    exchanges=st.lists(st.tuples(CONTENT, SAID), min_size=1, max_size=4),
    template=st.sampled_from([CHATML, PHI3, LLAMA2, GEMMA, ENDLESS]),
    learn=st.sampled_from(["all", "last"]),
)
def test_learned_is_what_the_assistant_says(
    system: str | None, exchanges: list[tuple[str, str]], template: str, learn: str
) -> None:
    trims = template in (LLAMA2, GEMMA)
    if trims:
        system = None
    tokenizer = letters(template)
    talk = [] if system is None else [turn("system", system)]
    for asked, answer in exchanges:
        talk += [turn("user", asked), turn("assistant", answer)]
    found = spans(tokenizer, talk, learn=learn)
    form = {CHATML: "{}<|im_end|>", PHI3: "{}<|end|>", LLAMA2: " {} </s>", GEMMA: "{}<end_of_turn>", ENDLESS: "{}</s>"}
    answers = [answer.strip() if trims else answer for _, answer in exchanges]
    expected = [form[template].format(answer) for answer in answers]
    assert [text for text, on in found if on] == (expected if learn == "all" else expected[-1:])
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    appended = "</s>" if template == ENDLESS else ""
    assert "".join(text.removesuffix(appended) if on else text for text, on in found) == whole


def test_a_turn_of_weight_0_is_context() -> None:
    talk = [
        turn("user", "one"),
        {**turn("assistant", "no"), "weight": 0},
        turn("user", "two"),
        {**turn("assistant", "yes"), "weight": 1},
    ]
    tokenizer = letters(CHATML, eos_token="<|im_end|>", pad_token="</s>")
    done = prepare([{"messages": talk}], tokenizer)
    (row,) = done.dataset
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == "yes<|im_end|>"
    assert "turns of weight 0 are context, not learned" in str(done.report)
