"""What a merge's certificate states, beside measurements that share no code with it; and merges of several adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import by_hand
import chat
import pytest
import tiny
import torch
from laws import shake
from safetensors.torch import load_file
from test_new_tokens import llama
from torch import nn
from typer.testing import CliRunner

import adapters
from adapters import Average, Split, Stack
from adapters._attach import tensors_of
from adapters._fourbit import dequantize
from adapters._merge import fold, prompts
from adapters.cli import app

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "nf4": torch.bfloat16}
EPS = {"fp32": 2**-24, "bf16": 2**-9, "fp16": 2**-11}  # half a unit in the last place, relative


def base(kind: str) -> nn.Module:
    model: nn.Module = tiny.build("llama", DTYPES[kind])
    if kind == "nf4":
        adapters.quantize(model, "nf4", compute_dtype=torch.bfloat16)
    return model


def run(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch).logits.double()
    return found


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", DTYPES)
def test_the_stated_errors_are_those_that_one_measures(kind: str, method: str) -> None:
    model, batch = base(kind), tiny.inputs("llama", rows=2, tokens=11, seed=8)
    plain = run(model, batch)
    adapters.attach(model, method, name="fr", rank=3, alpha=5.0)
    shake(model, "fr", noise=0.05)
    expected, seen = run(model, batch), {}
    sites = {site.path: site for site in adapters.adapters_of(model)["fr"].sites}
    before = {path: model.get_submodule(site.owner)._parameters["weight"] for path, site in sites.items()}
    dense = {path: (dequantize(w) if kind == "nf4" else w).detach().double() for path, w in before.items()}
    p = {path: {k: tensors_of(model, "fr")[f"{path}:{k}"].detach().double() for k in names(method)} for path in sites}
    handles = []
    for site in sites.values():

        def keep(module: nn.Module, args: tuple[Any, ...], path: str = site.path) -> None:
            seen.setdefault(path, args[0])

        handles.append(model.get_submodule(site.owner).register_forward_pre_hook(keep))
    run(model, batch)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        made = {path: model.get_submodule(sites[path].owner)(x).double() for path, x in seen.items()}
    found = adapters.merge(model, "fr", example=batch)
    merged = run(model, batch)
    assert found.error == pytest.approx(apart(merged, expected), rel=1e-4, abs=1e-12)
    assert found.effect == pytest.approx(apart(plain, expected), rel=1e-4)
    assert found.error <= found.tolerance < found.effect
    stated = {site.path: site for site in found.sites}
    assert stated.keys() == sites.keys()
    for path, site in stated.items():
        w = model.get_parameter(path).detach().double()
        exact = dense[path] + 5 / 3 * p[path]["b"] @ p[path]["a"]
        if method == "dora":
            exact = p[path]["magnitude"][:, None] * exact / exact.norm(dim=1, keepdim=True)
        assert w.dtype == torch.float64
        assert site.predicted == pytest.approx(apart(w, exact), rel=0.02, abs=3e-7)
        assert site.predicted < 1.01 * EPS["bf16" if kind == "nf4" else kind] or kind == "fp32"
        with torch.no_grad():
            y = model.get_submodule(sites[path].owner)(seen[path]).double()
        assert site.seen == pytest.approx(apart(y, made[path]), rel=0.05, abs=1e-7)


def names(method: str) -> tuple[str, ...]:
    return ("a", "b", "magnitude") if method == "dora" else ("a", "b")


@pytest.mark.parametrize("kind", DTYPES)
def test_a_merge_that_loses_more_than_its_budget_is_refused_and_undone(kind: str) -> None:
    model, batch = base(kind), tiny.inputs("llama", rows=2, tokens=11, seed=8)
    adapters.attach(model, "lora", name="fr", rank=3)
    shake(model, "fr", noise=0.05)
    twin = copy.deepcopy(model)
    error = adapters.merge(twin, "fr", example=batch).error
    expected = run(model, batch)
    with pytest.raises(adapters.AdapterError, match=r"changes the outputs by .*more than the tolerance"):
        adapters.merge(model, "fr", example=batch, tolerance=0.99 * error)
    assert torch.equal(run(model, batch), expected)
    assert adapters.merge(model, "fr", example=batch, tolerance=1.01 * error).error == error


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
@pytest.mark.parametrize("after", ["_apply", "beside", "detach"])
def test_an_interrupt_leaves_no_adapter_that_acts_twice(kind: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = base(kind), tiny.inputs("llama", rows=2, tokens=11, seed=8)
    adapters.attach(model, "lora", name="fr", rank=3)
    shake(model, "fr", noise=0.05)
    expected = run(model, batch)
    inner, calls = getattr(fold, after), []

    def interrupted(*args: Any) -> Any:
        found = inner(*args)
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(fold, after, interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapters.merge(model, "fr", example=batch)
    if after == "detach":  # of a merge that was done
        assert adapters.adapters_of(model) == {}
        assert apart(run(model, batch), expected) < 3e-2
    else:
        assert list(adapters.adapters_of(model)) == ["fr"]
        assert torch.equal(run(model, batch), expected)


def test_a_merge_back_into_4_bits_states_what_it_lost() -> None:
    model, batch = base("nf4"), tiny.inputs("llama", rows=2, tokens=11, seed=8)
    adapters.attach(model, "lora", name="fr", rank=3)
    shake(model, "fr", noise=0.02)
    expected = run(model, batch)
    found = adapters.merge(model, "fr", example=batch, requantize="nf4")
    assert found.error == pytest.approx(apart(run(model, batch), expected), rel=1e-4)
    assert found.error > 0.05 * found.effect
    assert any("that rounding is the error above" in note for note in found.notes)


@pytest.mark.parametrize(("noise", "said"), [(0.0004, True), (0.05, False)])
def test_an_adapter_that_does_less_than_the_base_can_hold_is_told(noise: float, said: bool) -> None:
    model = base("bf16")
    torch.manual_seed(1)
    adapters.attach(model, "lora", name="fr", rank=3)
    shake(model, "fr", noise=noise)
    found = adapters.merge(model, "fr")
    assert (found.error > 0.25 * found.effect) == said
    assert any("below what bfloat16 can hold" in note for note in found.notes) == said


# real prompts


def speaking(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    tokenizer = chat.letters(None, eos_token="</s>", pad_token="<s>")
    model = llama(tied=True, vocabulary=264).to(dtype)
    torch.manual_seed(2)
    adapters.attach(model, "lora", name="fr", rank=3)
    shake(model, "fr", noise=0.05)
    return model.eval(), tokenizer


def said(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    tokens: list[int] = out[0, ids["input_ids"].shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_answers_to_real_prompts_are_in_the_certificate(dtype: torch.dtype) -> None:
    model, tokenizer = speaking(dtype)
    texts = ["The capital", "Water boils at"]
    before = [said(model, tokenizer, text) for text in texts]
    rows = [torch.tensor([tokenizer(text)["input_ids"] + b]) for text, b in zip(texts, before, strict=True)]
    expected = [run(model, {"input_ids": row}) for row in rows]
    found = adapters.merge(model, "fr", prompts=texts, tokenizer=tokenizer)
    after = [said(model, tokenizer, text) for text in texts]
    for i, each in enumerate(found.prompts):
        assert (each.prompt, each.tokens) == (texts[i], len(before[i]))
        assert (each.adapted, each.merged) == (tokenizer.decode(before[i]), tokenizer.decode(after[i]))
        assert each.error == pytest.approx(apart(run(model, {"input_ids": rows[i]}), expected[i]), rel=1e-4, abs=1e-12)
        assert (each.margin is None) == (before[i] == after[i])
        agreed = next((n for n, (a, b) in enumerate(zip(before[i], after[i], strict=False)) if a != b), len(before[i]))
        assert each.agreed == agreed
    assert "prompt 'Water boils at'" in str(found)


def test_where_answers_part_the_margin_says_how_near_the_two_tokens_were() -> None:
    """An adapted model that would have said something else at the fourth token."""
    model, tokenizer = speaking()
    before, ids = said(model, tokenizer, "ab"), tokenizer("ab")["input_ids"]
    other = (before[3] + 1) % 264
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + before])).logits[0]
    given = prompts.Answer("ab", tuple(ids), (*before[:3], other, *before[4:]), logits)
    found = prompts.compared(model, tokenizer, [given])[0]
    top = logits[len(ids) + 2].topk(2).values
    assert (found.agreed, found.tokens) == (3, len(before))
    assert found.margin == pytest.approx(float(top[0] - top[1]))
    assert f"3 of {len(before)} tokens alike, then a choice" in str(found)


def test_a_prompt_whose_logits_move_too_far_refuses_the_merge() -> None:
    model, tokenizer = speaking(torch.bfloat16)
    for token in range(5, 60):  # an example on which bf16 happens to lose less than on the prompt
        twin, batch = speaking(torch.bfloat16)[0], {"input_ids": torch.tensor([[token]])}
        found = adapters.merge(twin, "fr", example=batch, prompts=["The capital of"], tokenizer=tokenizer)
        if found.error < 0.8 * found.prompts[0].error:
            break
    between = (found.error + found.prompts[0].error) / 2
    assert found.error < between
    with pytest.raises(adapters.AdapterError, match="the logits of 'The capital of' by"):
        adapters.merge(model, "fr", example=batch, prompts=["The capital of"], tokenizer=tokenizer, tolerance=between)
    assert "fr" in adapters.adapters_of(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 3.0, "top_k": 7},
        {"num_beams": 3, "num_return_sequences": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["a"], "min_new_tokens": 3},
        {"max_new_tokens": 2, "repetition_penalty": 2.0},
        None,
    ],
    ids=str,
)
def test_both_are_asked_greedily_whatever_the_models_own_settings_are(settings: dict[str, Any] | None) -> None:
    model, tokenizer = speaking()
    expected = adapters.merge(model, "fr", prompts="Water boils", tokenizer=tokenizer)
    model, _ = speaking()
    model.generation_config = None if settings is None else type(model.generation_config)(**settings)
    own = model.generation_config
    found = adapters.merge(model, "fr", prompts="Water boils", tokenizer=tokenizer)
    assert found.prompts == expected.prompts
    assert model.generation_config is own


def test_prompts_that_are_no_text_of_this_model_are_refused() -> None:
    model, tokenizer = speaking()
    tokenizer.add_tokens(["<later>"])
    for given, reason in (([3], "3, which is no text"), (["a<later>"], "others than this model's 264")):
        with pytest.raises(adapters.AdapterError, match=reason):
            adapters.merge(model, "fr", prompts=given, tokenizer=tokenizer)


def test_prompts_without_who_could_answer_are_refused() -> None:
    model, tokenizer = speaking()
    with pytest.raises(adapters.AdapterError, match="prompts need a tokenizer"):
        adapters.merge(model, "fr", prompts=["a"])
    encoder = tiny.build("bert_classifier")
    adapters.attach(encoder, "lora", name="fr")
    with pytest.raises(adapters.AdapterError, match="a decoder that generates text"):
        adapters.merge(encoder, "fr", prompts=["a"], tokenizer=tokenizer)
    with pytest.raises(adapters.AdapterError, match="'' has no tokens"):
        adapters.merge(model, "fr", prompts=[""], tokenizer=tokenizer)


# several adapters


def several(name: str = "llama") -> Any:
    model = tiny.build(name)
    for seed, (each, method, options) in enumerate(
        (
            ("one", "lora", {"rank": 2, "alpha": 3.0}),
            ("two", "dora", {"rank": 3, "targets": ["mlp.*", "attention.output"]}),
            ("three", "ia3", {"targets": ["attention.output", "mlp.up"], "feedforward": ()}),
        )
    ):
        adapters.attach(model, method, name=each, **options)
        shake(model, each, seed=seed, noise=0.04)
    return model


SELECTIONS: list[Any] = [
    Stack("two", "one", "three"),
    Stack("two", "three", "one"),
    Average("one", "two", "three", weights=(0.5, 0.75, -0.25)),
    Stack("two", Average("one", "three", weights=(0.3, 1.2)), None),
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_several_adapters_merge_as_their_selection_is_defined(name: str, selection: Any, tmp_path: Path) -> None:
    model, batch = several(name), tiny.inputs(name)
    plain = tiny.build(name)
    expected = by_hand.output(plain, selection, by_hand.parts_of(model), lambda: plain(**batch).logits)
    files = adapters.merge_files(model, selection, tmp_path / "merged", shard="60KB")
    adapters.compose(model, "all", selection)
    found = adapters.merge(model, "all")
    assert adapters.adapters_of(model) == {}
    assert found.error < 1e-5 < 1e-2 < found.effect
    assert apart(run(model, batch), expected.double()) < 1e-5
    assert files.name == found.name == repr(selection)
    held = {k: t for file in (tmp_path / "merged").glob("*.safetensors") for k, t in load_file(file).items()}
    assert all(torch.equal(held[path], p) for path, p in model.named_parameters())


def test_what_is_no_change_of_weights_is_refused() -> None:
    model = several()
    for selection, reason in (
        (Split("one", Stack("two", "three"), at=(3,)), "is no change of weights"),
        (["one", "two"], "name an adapter, or a Stack or Average"),
        (None, "name an adapter, or a Stack or Average"),
        (Stack("one", "two"), "would change the base of three"),
        (Stack("one", "four"), "no adapter 'four'"),
        (Stack(None, None), "names no adapter to merge"),
    ):
        with pytest.raises(adapters.AdapterError, match=reason):
            adapters.merge(model, selection)
    assert list(adapters.adapters_of(model)) == ["one", "two", "three"]
    adapters.attach(model, "bottleneck", name="four")
    with pytest.raises(adapters.AdapterError, match="bottleneck does not change weights"):
        adapters.merge(model, Stack("one", "two", "three", "four"))


def test_a_head_is_merged_in_a_stack_and_refused_in_an_average() -> None:
    model, batch = tiny.build("bert_classifier"), tiny.inputs("bert")
    for seed, (name, head) in enumerate((("one", True), ("two", False))):
        adapters.attach(model, "lora", name=name, rank=2, head=head)
        shake(model, name, seed=seed)
    with pytest.raises(adapters.AdapterError, match="one brings a head, of which an Average takes no part"):
        adapters.merge(model, Average("one", "two", weights=(0.85, 0.15)))
    adapters.activate(model, Stack("one", "two"))
    expected = run(model, batch)
    adapters.merge(model, Stack("one", "two"))
    assert apart(run(model, batch), expected) < 1e-5


def test_pefts_own_call_merges_several_too() -> None:
    pytest.importorskip("peft")
    model, batch = several(), tiny.inputs("llama")
    adapters.activate(model, Stack("one", "three"))
    expected = run(model, batch)
    with pytest.raises(adapters.AdapterError, match="no adapter 'four'"):
        model.merge_and_unload(adapter_names=["one", "four"])
    assert list(adapters.adapters_of(model)) == ["one", "two", "three"]
    model.merge_and_unload(adapter_names=["one", "three"])
    assert apart(run(model, batch), expected) < 1e-5


# into files: heads, labels and tokens


def test_a_head_with_other_labels_is_merged_into_files(tmp_path: Path) -> None:
    labels = {"id2label": {i: f"mood {i}" for i in range(5)}, "label2id": {f"mood {i}": i for i in range(5)}}
    wide = tiny.build("bert_classifier")
    wide.classifier = nn.Linear(64, 5)
    wide.num_labels = wide.config.num_labels = 5
    wide.config.id2label, wide.config.label2id = labels["id2label"], labels["label2id"]
    adapters.attach(wide, "lora", name="fr", rank=2)
    shake(wide, "fr")
    adapters.save(wide, "fr", tmp_path / "fr")
    model = tiny.build("bert_classifier")
    adapters.load(model, tmp_path / "fr", name="fr")
    expected = run(model, tiny.inputs("bert"))
    adapters.activate(model, None)
    adapters.merge_files(model, "fr", tmp_path / "merged", shard="60KB")
    assert model.config.num_labels == 3
    merged = type(tiny.build("bert_classifier")).from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == labels["id2label"]
    assert apart(run(merged.eval(), tiny.inputs("bert")), expected) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_are_merged_into_files(tied: bool, tmp_path: Path) -> None:
    model, tokenizer = llama(tied, 264), chat.letters(None)
    adapters.add_tokens(model, tokenizer, ["<tool>", "<out>"])
    adapters.attach(model, "lora", name="fr", rank=2, tokens=["<tool>", "<out>"], tokenizer=tokenizer)
    shake(model, "fr")
    batch = {"input_ids": torch.tensor([[9, 264, 40, 265, 7]])}
    expected = run(model, batch)
    found = adapters.merge_files(model, "fr", tmp_path / "merged", tokenizer=tokenizer, shard="60KB")
    assert any("wrote the rows of '<tool>'" in note for note in found.notes)
    merged = type(llama()).from_pretrained(tmp_path / "merged").eval()
    assert merged.config.tie_word_embeddings == tied
    assert merged.get_input_embeddings().weight.shape[0] == 266
    assert apart(run(merged, batch), expected) < 1e-5
    adapters.merge(model, "fr")
    held = dict(merged.named_parameters())
    assert all(torch.equal(held[path], p) for path, p in model.named_parameters())


@pytest.mark.parametrize("sharded", [False, True])
def test_the_command_writes_answers_to_prompts_beside_the_model(sharded: bool, tmp_path: Path) -> None:
    tokenizer = chat.letters(None, eos_token="</s>", pad_token="<s>")
    plain = llama(tied=True, vocabulary=264)
    plain.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapters.attach(plain, "lora", name="fr", rank=2)
    shake(plain, "fr")
    adapters.save(plain, "fr", tmp_path / "fr")
    (tmp_path / "prompts.txt").write_text("One more\n\nand another\n")
    places = [str(tmp_path / name) for name in ("base", "fr", "merged", "prompts.txt")]
    more = ["--shards", "60KB"] if sharded else []
    command = ["merge", *places[:2], "--output", places[2], *more]
    done = CliRunner().invoke(app, [*command, "--prompts", places[3]])
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "merged" / "merge_certificate.json").read_text())
    assert [each["prompt"] for each in kept["prompts"]] == ["One more", "and another"]
    assert all(each["adapted"] == each["merged"] for each in kept["prompts"])
    usual = CliRunner().invoke(app, [*command[:3], "--output", f"{places[2]}2", *more])
    assert usual.exit_code == 0, usual.output
    assert "prompt 'The capital of France is'" in usual.output
