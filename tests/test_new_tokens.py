"""New tokens: rows that are added to a model the same way each time, and train with an adapter of any method.

The truth beside them: a plain copy of the model whose table trains behind a mask of its gradient, and stock PEFT.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import chat
import pytest
import tiny
import torch
import transformers as hf
from laws import LAWS, Case, assert_same, frozen, output, relative, shake, snapshot
from test_store_folder import forge
from torch.nn.functional import cross_entropy

import adapters
from adapters import AdapterError, Average
from adapters._attach import adapters_of, tensors_of
from adapters._attach.factored import formed_densely
from adapters._store.fingerprints import check, fingerprint

IDS = [17, 3, 150]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 6.0},
    "bottleneck": {"reduction_factor": 6.0},
    "prefix": {"length": 3},
}


def llama(tied: bool = False, vocabulary: int = tiny.VOCAB, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {**tiny._GROUPED, "vocab_size": vocabulary, "tie_word_embeddings": tied}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model.to(dtype).eval()


BASES: dict[str, Callable[[], Any]] = {
    "untied": llama,
    "tied": partial(llama, tied=True),
    "gpt2": partial(tiny.build, "gpt2"),
}


def batch() -> dict[str, torch.Tensor]:
    """Rows in which the first two tokens occur; the third is met at the output alone."""
    found = tiny.inputs("llama", rows=3, tokens=9, padded=True)
    found["input_ids"][0, 2], found["input_ids"][0, 5], found["input_ids"][1, 1] = 17, 3, 17
    found["input_ids"][found["input_ids"] == 150] = 21
    return found


def rows_of(model: Any, name: str = "fr") -> dict[str, torch.nn.Parameter]:
    return {key.removesuffix(":tokens.rows"): t for key, t in tensors_of(model, name).items() if key.endswith(".rows")}


def cases() -> list[Any]:
    found = []
    for where, build in BASES.items():
        for method, options in METHODS.items():
            case = Case(build, batch(), method, {**options, "tokens": IDS})
            found.append(pytest.param(case, id=f"{where}-{method}"))
    bf16 = torch.bfloat16
    everywhere = {"targets": ["all", "embedding", "head"], "tokens": IDS}
    more = {
        "untied-lora-bf16": Case(partial(llama, dtype=bf16), batch(), "lora", {"tokens": IDS}, bf16),
        "tied-bottleneck-bf16": Case(partial(llama, True, dtype=bf16), batch(), "bottleneck", {"tokens": IDS}, bf16),
        "tied-qlora": Case(partial(llama, True, dtype=bf16), batch(), "qlora", {"tokens": IDS}, bf16, nf4=True),
        "untied-ia3": Case(llama, batch(), "ia3", {"tokens": IDS}, noise=0.5),
        "gemma2-dora": Case(partial(tiny.build, "gemma2"), batch(), "dora", {"tokens": IDS}),
        "bert-lora": Case(partial(tiny.build, "bert"), batch(), "lora", {"tokens": IDS}),
        "classifier-lora": Case(partial(tiny.build, "bert_classifier"), batch(), "lora", {"tokens": IDS[:2]}),
        "tables-too-lora": Case(llama, batch(), "lora", {**everywhere, "rank": 3}),
    }
    return found + [pytest.param(case, id=name) for name, case in more.items()]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", cases())
def test_law(case: Case, law: Callable[[Case, Path], None], tmp_path: Path) -> None:
    law(case, tmp_path / "adapter")


@pytest.mark.parametrize("where", BASES)
def test_the_trained_rows_are_looked_up_and_give_the_logits_and_nothing_else_moves(where: str) -> None:
    """Against a plain model with these values written into its tables."""
    model, plain = frozen(BASES[where]()), frozen(BASES[where]())
    adapters.attach(model, "lora", name="fr", tokens=IDS)
    assert len(rows_of(model)) == (2 if where == "untied" else 1)
    others = [i for i in range(tiny.VOCAB) if i not in IDS]
    ids, states = torch.arange(tiny.VOCAB)[None], torch.randn(2, 5, tiny.HIDDEN)
    before = model.get_input_embeddings()(ids), model.get_output_embeddings()(states)
    shake(model, "fr", noise=0.3)
    with torch.no_grad():
        for path, rows in rows_of(model).items():
            assert rows.shape == (3, tiny.HIDDEN)
            plain.get_parameter(path)[sorted(IDS)] = rows
    found = model.get_input_embeddings()(ids), model.get_output_embeddings()(states)
    expected = plain.get_input_embeddings()(ids), plain.get_output_embeddings()(states)
    assert torch.equal(found[0][:, others], before[0][:, others])
    assert torch.equal(found[1][..., others], before[1][..., others])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
    assert relative(found[0], before[0]) > 1e-2
    assert relative(found[1], before[1]) > 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", BASES)
def test_training_is_that_of_a_plain_table_behind_a_mask(where: str, method: str) -> None:
    """Three steps of SGD with the method's own tensors frozen: for LoRA and bottleneck the base's function."""
    model, plain = BASES[where](), BASES[where]()
    torch.manual_seed(1)
    adapters.attach(model, method, name="fr", tokens=IDS, **METHODS[method])
    if method == "prefix":  # which is not the base when it is fresh
        adapters.attach(plain, "prefix", name="fr", **METHODS[method])
    for each in (model, plain):
        for parameter in each.parameters():
            parameter.requires_grad_(False)
    start = {path: table.detach().clone() for path, table in plain.named_parameters()}
    tables = {path: plain.get_parameter(path) for path in rows_of(model)}
    mask = torch.zeros(tiny.VOCAB, 1)
    mask[IDS] = 1.0
    for table in tables.values():
        table.requires_grad_(True).register_hook(lambda grad: grad * mask)
    rows = list(rows_of(model).values())
    losses = [_steps(each, wanted) for each, wanted in ((model, rows), (plain, list(tables.values())))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][2] < losses[0][0]
    for path, trained in rows_of(model).items():
        torch.testing.assert_close(trained, tables[path][sorted(IDS)], rtol=0, atol=1e-6)
        assert not torch.equal(trained, start[path][sorted(IDS)])
    for path, parameter in model.named_parameters():
        if path in start:
            assert torch.equal(parameter, start[path]), path


def _steps(model: Any, trained: list[torch.nn.Parameter]) -> list[float]:
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(trained, lr=0.5)
    ids = tiny.inputs("llama", rows=2, tokens=9)["input_ids"]
    ids[0, 3], ids[0, 4], ids[1, 2], ids[1, 7] = 17, 3, 150, 17
    found = []
    for _ in range(3):
        loss = cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_the_padding_token_is_not_trained_at_the_input() -> None:
    """As torch's own lookup has it: a row that is only there to fill rows takes no gradient where it does."""
    model, plain = llama(), llama()
    assert plain.model.embed_tokens.padding_idx == 0
    ids, found = {"input_ids": torch.tensor([[5, 0, 17, 9], [17, 3, 0, 0]])}, []
    adapters.attach(model, "lora", name="fr", tokens=[0, 17])
    for each, rows in ((model, rows_of(model)), (plain, {p: plain.get_parameter(p) for p in rows_of(model)})):
        each(**ids).logits.pow(2).sum().backward()
        found.append({path: tensor.grad[[0, 17] if len(tensor) > 2 else [0, 1]] for path, tensor in rows.items()})
    for path, grad in found[1].items():
        torch.testing.assert_close(found[0][path], grad, rtol=1e-4, atol=1e-4)
    assert found[0]["model.embed_tokens.weight"].norm(dim=1).tolist()[0] == 0.0
    assert found[0]["lm_head.weight"].norm(dim=1).min() > 0


def test_no_table_is_formed_in_a_forward_and_its_gradient() -> None:
    model = llama()
    adapters.attach(model, "lora", name="fr", tokens=IDS)
    formed_densely.clear()
    model(**batch()).logits.sum().backward()
    assert not formed_densely
    dense = model.lm_head.weight.mT  # by code that reads the weight in another way
    assert formed_densely.total() == 1
    torch.testing.assert_close(dense[:, IDS].mT, model.lm_head._parameters["weight"][IDS])


def test_a_copy_is_a_model_of_its_own() -> None:
    model = llama(tied=True)
    adapters.attach(model, "lora", name="fr", tokens=IDS)
    shake(model, "fr")
    expected, twin = output(model, batch()), copy.deepcopy(model)
    assert torch.equal(output(twin, batch()), expected)
    shake(twin, "fr", seed=5)
    assert torch.equal(output(model, batch()), expected)
    assert len(rows_of(twin)) == 1  # still shared by both ends
    assert sum(key.endswith("-rows.rows") for key, _ in twin.named_parameters()) == 1


@pytest.mark.parametrize(
    "options", [{"tokens": IDS}, {"targets": ["embedding"]}, {"tokens": IDS, "targets": "embedding"}]
)
def test_compiled_is_eager(options: dict[str, Any]) -> None:
    model = llama(tied=True)
    adapters.attach(model, "lora", name="fr", **options)
    shake(model, "fr")
    ids = {"input_ids": batch()["input_ids"]}
    expected = output(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(output(compiled, ids), expected, rtol=1e-5, atol=1e-5)


# adding tokens


def test_new_rows_are_the_mean_of_the_pieces_and_the_same_each_time() -> None:
    for tied in (False, True):
        model, tokenizer = llama(tied, 264), chat.letters(None)
        pieces, state = tokenizer("<tool>").input_ids, torch.get_rng_state()
        old = {path: p.detach().clone() for path, p in model.named_parameters()}
        report = adapters.add_tokens(model, tokenizer, ["<tool>", "<|im_end|>", "<out>"])
        assert torch.equal(torch.get_rng_state(), state)
        assert report.ids == {"<tool>": 264, "<|im_end|>": 259, "<out>": 265}
        assert report.known == ("<|im_end|>",)
        assert set(report.resized.values()) == {(264, 266)}
        assert "<out>" in str(report)
        assert tokenizer("a<tool>b").input_ids[1:-1] == [264]
        assert model.config.vocab_size == model.lm_head.out_features == 266
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert len(report.resized) == 2 - tied
        for path, parameter in model.named_parameters():
            kept = parameter[:264] if path in report.resized else parameter
            assert torch.equal(kept, old[path]), path
        for path in report.resized:
            mean = old[path][pieces].double().mean(0)
            torch.testing.assert_close(model.get_parameter(path)[264].double(), mean, rtol=2e-2, atol=1e-3)

        again, grown = llama(tied, 264), chat.letters(None)
        grown.add_tokens(["<tool>", "<out>"], special_tokens=True)  # a tokenizer that was saved with its tokens
        adapters.add_tokens(again, grown, ["<tool>", "<out>"])
        assert all(torch.equal(model.get_parameter(path), p) for path, p in again.named_parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("met", [torch.float32, torch.bfloat16])
def test_a_base_with_new_rows_is_recognised_in_any_precision(stored: torch.dtype, met: torch.dtype) -> None:
    there, here = (llama(vocabulary=264).to(dtype) for dtype in (stored, met))
    adapters.add_tokens(there, chat.letters(None), ["<tool>", "<out>"])
    adapters.add_tokens(here, chat.letters(None), ["<tool>", "<out>"])
    assert "agree" in check(fingerprint(there), here)
    assert here.lm_head.weight.dtype == met


def test_tokens_that_nothing_is_known_of_start_as_the_mean_of_all_rows() -> None:
    class Plain:
        """A tokenizer that is not transformers', without pieces to look at."""

        def __init__(self) -> None:
            self.vocabulary = {str(i): i for i in range(264)}

        def get_vocab(self) -> dict[str, int]:
            return dict(self.vocabulary)

        def add_tokens(self, tokens: list[str], special_tokens: bool) -> None:
            self.vocabulary.update({token: len(self.vocabulary) + i for i, token in enumerate(tokens)})

    model, tokenizer = llama(vocabulary=264), Plain()
    adapters.add_tokens(model, tokenizer, "<tool>")
    table = model.lm_head.weight
    torch.testing.assert_close(table[264], table[:264].mean(0), rtol=2e-2, atol=2e-3)


def test_a_bias_of_the_output_grows_as_well() -> None:
    model, tokenizer = tiny.build("bert"), chat.letters(None)
    hold = model.cls.predictions.decoder
    with torch.no_grad():
        hold.bias.copy_(torch.randn(160))
    few = {token: number for token, number in tokenizer.get_vocab().items() if number < 160}
    assert len(few) == 160
    report = adapters.add_tokens(model, tokenizer, ["<tool>"])
    pieces = [piece for piece in chat.letters(None)("<tool>").input_ids if piece < 160]
    assert report.ids == {"<tool>": 264}
    assert any("104 further rows" in note for note in report.notes)
    assert hold.bias.shape == (265,)
    torch.testing.assert_close(hold.bias[264], hold.bias[pieces].mean(), rtol=2e-2, atol=2e-3)
    assert output(model, {"input_ids": torch.tensor([[264, 3]])}).shape[-1] == 265


def test_rows_beyond_the_vocabulary_are_used_as_they_are() -> None:
    model, tokenizer = llama(vocabulary=270), chat.letters(None)
    before = snapshot(model)
    report = adapters.add_tokens(model, tokenizer, ["<tool>", "<out>"])
    assert report.resized == {}
    assert "had already" in report.notes[0]
    assert tokenizer.get_vocab()["<out>"] == 265
    assert_same(snapshot(model), before)


def test_tables_of_different_lengths_grow_to_one() -> None:
    model, tokenizer = llama(vocabulary=264), chat.letters(None)
    with torch.no_grad():
        longer = torch.nn.Linear(64, 270, bias=False)
        longer.weight[:264] = model.lm_head.weight
    model.lm_head = longer
    head, pieces = longer.weight.detach().clone(), tokenizer("<tool>").input_ids
    report = adapters.add_tokens(model, tokenizer, "<tool>")
    assert report.resized == {"model.embed_tokens.weight": (264, 270)}
    assert torch.equal(model.lm_head.weight, head)
    table = model.model.embed_tokens.weight
    torch.testing.assert_close(table[264], table[pieces].mean(0), rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(table[265:], table[:264].mean(0).expand(5, -1), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_what_fails_half_way_leaves_model_and_tokenizer_as_they_were(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = llama(tied, 264), chat.letters(None)
    before, vocabulary, config = snapshot(model), tokenizer.get_vocab(), model.config.to_dict()
    resize = type(model).resize_token_embeddings

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        resize(self, *args, **kwargs)
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(type(model), "resize_token_embeddings", failing)
    with pytest.raises(AdapterError, match="no memory is left"):
        adapters.add_tokens(model, tokenizer, ["<tool>"])
    assert_same(snapshot(model), before)
    assert tokenizer.get_vocab() == vocabulary
    assert model.config.to_dict() == config
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_what_cannot_grow_is_refused() -> None:
    attached = llama(vocabulary=264)
    adapters.attach(attached, "lora")
    vit = hf.ViTModel(hf.ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64))
    quantised = llama(vocabulary=264)
    from bitsandbytes.nn import Linear4bit

    head = Linear4bit(64, 264, bias=False, quant_type="nf4")
    head.load_state_dict(quantised.lm_head.state_dict())
    quantised.lm_head = head.to("cpu")
    quantised.lm_head.weight.quantize("cpu") if not hasattr(quantised.lm_head.weight, "quant_state") else None
    refusals: list[tuple[Any, Any, str]] = [
        (attached, ["<a>"], "adapters are attached"),
        (vit, ["<a>"], "no table of tokens"),
        (torch.nn.Linear(3, 3), ["<a>"], "no embeddings that transformers can resize"),
        (llama(vocabulary=264), [], "give texts"),
        (llama(vocabulary=264), [5], "give texts"),
        (quantised, ["<a>"], "in 4 bits"),
    ]
    for model, tokens, sentence in refusals:
        tokenizer, before = chat.letters(None), snapshot(model)
        with pytest.raises(AdapterError, match=sentence):
            adapters.add_tokens(model, tokenizer, tokens)
        assert_same(snapshot(model), before)
        assert tokenizer.get_vocab() == chat.letters(None).get_vocab()


# attaching


def test_tokens_are_named_by_text_or_number() -> None:
    model, tokenizer = llama(vocabulary=264), chat.letters(None)
    adapters.add_tokens(model, tokenizer, ["<tool>", "<out>"])
    report = adapters.attach(model, "lora", name="fr", tokens=["<out>", 10, "<tool>"], tokenizer=tokenizer)
    assert report.tokens.ids == (10, 264, 265)
    assert report.tokens.texts == ("+", "<tool>", "<out>")
    assert "'<tool>' (264), '<out>' (265) in model.embed_tokens.weight and lm_head.weight" in str(report)
    plain = adapters.attach(llama(vocabulary=264), "lora")
    assert report.parameters == plain.parameters + 2 * 3 * 64


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tokens": ["<tool>"]}, "pass tokenizer="),
        ({"tokens": ["<|im_ned|>"], "tokenizer": "yes"}, r"did you mean '<\|im_end\|>'.*add_tokens\(model, tokenizer"),
        ({"tokens": []}, "empty"),
        ({"tokens": [5, 7, 5]}, "5 twice"),
        ({"tokens": [True]}, "True"),
        ({"tokens": [-1]}, "-1"),
        ({"tokens": [264]}, "has 264 rows.*add_tokens"),
        ({"tokens": [3], "head": ["lm_head"]}, "head='lm_head' trains all rows"),
    ],
)
def test_tokens_that_cannot_train_are_refused(options: dict[str, Any], sentence: str) -> None:
    model = llama(vocabulary=264)
    before = snapshot(model)
    if "tokenizer" in options:
        options = {**options, "tokenizer": chat.letters(None)}
    with pytest.raises(AdapterError, match=sentence):
        adapters.attach(model, "qlora", name="fr", **options)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("target", ["head", "embedding"])
def test_a_method_that_scales_the_table_is_refused_and_one_that_adds_is_not(target: str) -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"dora would scale .*: leave it out of targets="):
        adapters.attach(model, "dora", tokens=IDS, targets=["attention.*", target])
    assert_same(snapshot(model), before)
    adapters.attach(model, "lora", tokens=IDS, targets=["attention.*", target])


def test_a_model_without_a_table_of_tokens_is_refused() -> None:
    config = hf.ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    model = hf.ViTModel(config)
    before = snapshot(model)
    with pytest.raises(AdapterError, match="no table of tokens"):
        adapters.attach(model, "lora", tokens=[3])
    assert_same(snapshot(model), before)


# on disk


def trained(tied: bool = False, method: str = "lora") -> tuple[Any, Any]:
    model, tokenizer = llama(tied, 264), chat.letters(None)
    adapters.add_tokens(model, tokenizer, ["<tool>", "<out>"])
    adapters.attach(model, method, name="fr", tokens=["<tool>", "<out>"], tokenizer=tokenizer)
    shake(model, "fr")
    return model, tokenizer


def marked() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[5, 264, 9, 265, 7], [265, 8, 8, 6, 264]])}


@pytest.mark.parametrize("method", METHODS)
def test_saved_is_loaded_on_a_base_that_grew_alike_and_refused_on_one_that_did_not(method: str, tmp_path: Path) -> None:
    model, _ = trained(method=method)
    adapters.save(model, "fr", tmp_path)
    record = json.loads((tmp_path / "adapter.json").read_text())
    tables = ["model.embed_tokens.weight", "lm_head.weight"]
    assert record["tokens"] == {"ids": [264, 265], "texts": ["<tool>", "<out>"], "tables": tables}
    assert "'<tool>' (264)" in adapters.inspect(tmp_path).facts["tokens"]

    small = llama(vocabulary=264)
    before = snapshot(small)
    for force in (None, "wrong-base"):
        with pytest.raises(AdapterError, match=r"add_tokens\(model, tokenizer, \['<tool>', '<out>'\]\)"):
            adapters.load(small, tmp_path, force=force)
    assert_same(snapshot(small), before)
    adapters.add_tokens(small, chat.letters(None), ["<tool>", "<out>"])
    report = adapters.load(small, tmp_path)
    assert any("'<out>' (265)" in note for note in report.notes)
    assert torch.equal(output(small, marked()), output(model, marked()))

    swapped, _ = trained(method="bottleneck")
    adapters.swap(swapped, "fr", tmp_path)
    assert torch.equal(output(swapped, marked()), output(model, marked()))
    adapters.detach(swapped)
    adapters.load(swapped, tmp_path, trainable=True)
    shake(swapped, "fr", seed=7)
    adapters.restore(swapped, "fr", tmp_path)
    assert torch.equal(output(swapped, marked()), output(model, marked()))


# loading with a tokenizer: the base grows


@pytest.mark.parametrize("tied", [False, True])
def test_with_a_tokenizer_the_base_grows_as_it_did_where_the_adapter_was_trained(tied: bool, tmp_path: Path) -> None:
    model, there = trained(tied)
    adapters.save(model, "fr", tmp_path)
    fresh, here = llama(tied, 264), chat.letters(None)
    report = adapters.load(fresh, tmp_path, tokenizer=here)
    assert any("took '<tool>', '<out>', as special tokens" in note for note in report.notes)
    assert sum("has 266 rows now" in note for note in report.notes) == 2 - tied
    assert "agree" in report.base
    assert here.get_vocab() == there.get_vocab()
    assert (fresh.lm_head._parameters["weight"] is fresh.model.embed_tokens._parameters["weight"]) == tied
    assert torch.equal(output(fresh, marked()), output(model, marked()))
    with adapters.using(fresh, None), adapters.using(model, None):
        assert torch.equal(output(fresh, marked()), output(model, marked()))
    assert here("<tool>").input_ids[-1] == 264
    again = adapters.load(fresh, tmp_path, name="again", tokenizer=here)  # all is there already
    assert not any("took" in note or "rows now" in note for note in again.notes)


def _other_base(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)


def _another_token(model: Any, tokenizer: Any) -> None:
    tokenizer.add_tokens(["<before>"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_other_base, "another base|not the base|differ"),
        (_another_token, "gives '<tool>' the number 265, and the adapter was trained with 264"),
        (lambda model, tokenizer: adapters.attach(model, "lora", name="other"), "adapters are attached"),
    ],
)
def test_what_is_refused_leaves_base_and_tokenizer_as_they_were(change: Any, sentence: str, tmp_path: Path) -> None:
    adapters.save(trained()[0], "fr", tmp_path)
    model, tokenizer = llama(vocabulary=264), chat.letters(None)
    change(model, tokenizer)
    before, vocabulary, config = snapshot(model), tokenizer.get_vocab(), model.config.to_dict()
    with pytest.raises(AdapterError, match=sentence):
        adapters.load(model, tmp_path, tokenizer=tokenizer)
    assert_same(snapshot(model), before)
    assert tokenizer.get_vocab() == vocabulary
    assert model.config.to_dict() == config


def test_a_composition_brings_the_tokens_of_its_parts(tmp_path: Path) -> None:
    model, _ = trained()
    adapters.attach(model, "lora", name="de", targets=["attention.value"])
    shake(model, "de", seed=4)
    adapters.compose(model, "both", adapters.Stack("fr", "de"))
    adapters.activate(model, "both")
    adapters.save(model, "both", tmp_path)
    fresh, tokenizer = llama(vocabulary=264), chat.letters(None)
    report = adapters.load(fresh, tmp_path, tokenizer=tokenizer)
    assert any("took '<tool>'" in note for note in report.notes)
    assert torch.equal(output(fresh, marked()), output(model, marked()))


def test_tokens_that_are_not_special_come_back_as_they_were(tmp_path: Path) -> None:
    model, there = llama(vocabulary=264), chat.letters(None)
    adapters.add_tokens(model, there, ["<tool>"])
    adapters.add_tokens(model, there, ["plain"], special=False)
    adapters.attach(model, "lora", name="fr", tokens=["plain", "<tool>"], tokenizer=there)
    shake(model, "fr")
    adapters.save(model, "fr", tmp_path)
    fresh, here = llama(vocabulary=264), chat.letters(None)
    report = adapters.load(fresh, tmp_path, tokenizer=here)
    assert any("took '<tool>', as special tokens" in note for note in report.notes)
    assert any("took 'plain'." in note for note in report.notes)
    for tokenizer in (there, here):
        assert tokenizer.decode([264, 265, 9], skip_special_tokens=True) == "plain" + tokenizer.decode([9])
    assert torch.equal(output(fresh, marked()), output(model, marked()))


def test_parts_bring_tokens_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Whatever the parts are called, and however their numbers lie between each other's."""
    model, tokenizer = llama(vocabulary=264), chat.letters(None)
    adapters.add_tokens(model, tokenizer, ["<a>", "<b>", "<c>"])
    for seed, (name, tokens) in enumerate((("zz", ["<a>", "<c>"]), ("aa", ["<b>"]))):
        adapters.attach(model, "lora", name=name, tokens=tokens, tokenizer=tokenizer)
        shake(model, name, seed=seed)
    adapters.compose(model, "both", adapters.Stack("zz", "aa"))
    adapters.activate(model, "both")
    adapters.save(model, "both", tmp_path)
    fresh, here = llama(vocabulary=264), chat.letters(None)
    adapters.load(fresh, tmp_path, tokenizer=here)
    batch = {"input_ids": torch.tensor([[5, 264, 9, 265, 266]])}
    assert torch.equal(output(fresh, batch), output(model, batch))
    assert here.get_vocab() == tokenizer.get_vocab()


def test_tokens_without_texts_need_a_base_that_has_them(tmp_path: Path) -> None:
    model, tokenizer = llama(vocabulary=264), chat.letters(None)
    adapters.attach(model, "lora", name="fr", tokens=[7, 9])
    adapters.save(model, "fr", tmp_path)
    with pytest.raises(AdapterError, match="does not say what its tokens 7, 9 are"):
        adapters.load(llama(vocabulary=264), tmp_path, tokenizer=tokenizer)
    adapters.load(llama(vocabulary=264), tmp_path)


def test_commands_bring_the_tokens_too(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from adapters.cli import app

    llama(True, 264).save_pretrained(tmp_path / "base")
    chat.letters(None, eos_token="</s>", pad_token="<s>").save_pretrained(tmp_path / "base")
    base, tokenizer = adapters.load_base(str(tmp_path / "base"), dtype=torch.float32)
    adapters.add_tokens(base, tokenizer, ["<tool>", "<out>"])
    adapters.attach(base, "lora", name="fr", tokens=["<tool>", "<out>"], tokenizer=tokenizer)
    shake(base, "fr")
    adapters.save(base, "fr", tmp_path / "fr")
    places = [str(tmp_path / name) for name in ("base", "fr", "merged")]
    done = CliRunner().invoke(app, ["merge", *places[:2], "--output", places[2]])
    assert done.exit_code == 0, done.output
    merged = hf.AutoModelForCausalLM.from_pretrained(places[2], dtype=torch.float32).eval()
    assert relative(output(merged, marked()), output(base, marked())) < 1e-5
    assert hf.AutoTokenizer.from_pretrained(places[2])("<out>").input_ids[-1] == 265


def test_rows_of_other_tokens_are_not_restored(tmp_path: Path) -> None:
    model, _ = trained()
    adapters.save(model, "fr", tmp_path)
    adapters.detach(model)
    adapters.attach(model, "lora", name="fr", tokens=[264, 7])
    before = {key: tensor.detach().clone() for key, tensor in tensors_of(model, "fr").items()}
    with pytest.raises(AdapterError, match=r"\[264, 265\] instead of \[7, 264\]"):
        adapters.restore(model, "fr", tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors_of(model, "fr").items())


def _less(found: dict[str, Any]) -> None:
    del found["tensors"]["lm_head.weight:tokens.rows"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f, t: f["tokens"].update(ids=[265, 264]), "do not ascend"),
        (lambda f, t: f["tokens"].update(ids=[264, 264]), "do not ascend"),
        (lambda f, t: f["tokens"].update(ids=[-1, 264]), "do not ascend"),
        (lambda f, t: f["tokens"].update(ids=[264]), "others are missing"),
        (lambda f, t: f["tokens"].update(ids=[264.0, 265.0]), "ids is not a list of int"),
        (lambda f, t: f["tokens"].update(ids=[True, 265]), "ids is not a list of int"),
        (lambda f, t: f["tokens"].update(texts="ab"), "texts is not a list"),
        (lambda f, t: f["tokens"].update(more=[]), "does not describe tokens"),
        (lambda f, t: f["tokens"].pop("tables"), "does not describe tokens"),
        (lambda f, t: f["tokens"].update(tables=["lm_head.weight"]), "none of its tables"),
        (lambda f, t: f["tokens"].update(tables=["lm_head.weight", "model.norm.weight"]), "model.norm.weight"),
        (lambda f, t: f["tokens"].update(tables=["lm_head.weight", "model.more.weight"]), "no model.more.weight"),
        (lambda f, t: f["tokens"].update(ids=[1, 264], texts=["a", "b"]), None),
        (lambda f, t: f["tokens"].update(ids=[1, 2, 3], texts=["a", "b", "c"]), r"\(2, 64\) and should be \(3, 64\)"),
        (lambda f, t: f.update(tokens=None), "none of its tables"),
        (lambda f, t: f.pop("tokens"), "canonical"),
        (lambda f, t: f.update(format=2), "canonical"),
    ],
)
def test_a_record_of_tokens_is_read_strictly(change: Any, sentence: str | None, tmp_path: Path) -> None:
    model, _ = trained(method="bottleneck")
    adapters.save(model, "fr", tmp_path)
    forge(tmp_path, change)
    adapters.detach(model)
    before = snapshot(model)
    if sentence is None:  # another pair of tokens is a record like any other
        adapters.load(model, tmp_path)
        return
    with pytest.raises(AdapterError, match=sentence):
        adapters.load(model, tmp_path)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("tied", [False, True])
def test_stock_peft_reads_the_folder(tied: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, _ = trained(tied)
    assert adapters.save(model, "fr", tmp_path).peft == "written"
    stock = llama(tied, 264)
    adapters.add_tokens(stock, chat.letters(None), ["<tool>", "<out>"])
    base = output(stock, marked())
    stock = peft.PeftModel.from_pretrained(stock, str(tmp_path)).eval()
    assert relative(output(stock, marked()), output(model, marked())) < 1e-5
    assert relative(output(stock, marked()), base) > 1e-2


def test_what_peft_cannot_say_is_said_to_be_so(tmp_path: Path) -> None:
    reasons: dict[str, tuple[Callable[[], Any], str, dict[str, Any]]] = {
        "beside LoRA only": (llama, "ia3", {}),
        "adapts lm_head or trains rows of it": (llama, "lora", {"targets": ["all", "head"]}),
        "drops the bias of cls.predictions.decoder": (partial(tiny.build, "bert"), "lora", {}),
    }
    for number, (reason, (build, method, options)) in enumerate(reasons.items()):
        model = build()
        adapters.attach(model, method, name="fr", tokens=IDS, **options)
        shake(model, "fr")
        assert reason in adapters.save(model, "fr", tmp_path / str(number)).peft
        fresh = build()
        adapters.load(fresh, tmp_path / str(number))
        assert torch.equal(output(fresh, batch()), output(model, batch()))
    silent, _ = trained(tied=True)
    silent.config.tie_word_embeddings = False
    assert "is tied, and the model's configuration does not say so" in adapters.save(silent, "fr", tmp_path).peft


# merging


def test_a_merge_is_measured_where_the_tokens_are() -> None:
    """A classifier has no logits of tokens: without one among its inputs nothing would be compared."""
    model = tiny.build("bert_classifier")
    adapters.attach(model, "lora", name="fr", tokens=IDS)
    with torch.no_grad():
        for rows in rows_of(model).values():
            rows.mul_(-2.0)
    certificate = adapters.merge(model, "fr")
    assert certificate.error < 1e-5
    assert certificate.effect > 1e-3


@pytest.mark.parametrize("where", BASES)
@pytest.mark.parametrize("given", [True, False])
def test_merged_rows_are_written_into_the_table(where: str, given: bool) -> None:
    model = BASES[where]()
    adapters.attach(model, "lora", name="fr", tokens=IDS)
    shake(model, "fr")
    adapted = output(model, batch())
    rows = {path: rows.detach().clone() for path, rows in rows_of(model).items()}
    certificate = adapters.merge(model, "fr", example=batch() if given else None)
    assert certificate.error < 1e-5 < certificate.effect
    assert {site.path for site in certificate.sites} > set(rows)
    assert any("17, 150" in note for note in certificate.notes)
    plain = BASES[where]()
    for path, trained_rows in rows.items():
        table = model.get_parameter(path)
        assert torch.equal(table[sorted(IDS)], trained_rows)
        others = [i for i in range(tiny.VOCAB) if i not in IDS]
        assert torch.equal(table[others], plain.get_parameter(path)[others])
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (where != "untied")
    assert relative(output(model, batch()), adapted) < 1e-5


def test_a_merge_that_is_refused_gives_the_table_back() -> None:
    model = llama(tied=True)
    adapters.attach(model, "lora", name="fr", tokens=IDS)
    shake(model, "fr")
    before = snapshot(model)
    with pytest.raises(AdapterError, match="tolerance"):
        adapters.merge(model, "fr", example=batch(), tolerance=0.0)
    assert_same(snapshot(model), before)


# trainers and peft


def test_a_second_adapter_through_peft_is_a_copy_with_its_rows() -> None:
    peft = pytest.importorskip("peft")
    tokenizer = chat.letters(None)
    model = llama(vocabulary=264)
    config = adapters.peft_config("lora", tokens="<|im_end|>", tokenizer=tokenizer)
    assert json.loads(json.dumps(config.to_dict(), default=str))["tokens"] == ["<|im_end|>"]
    model = peft.get_peft_model(model, config)
    assert adapters_of(model)["default"].tokens.ids == (259,)
    shake(model, "default")
    model.add_adapter("twin", model.peft_config["default"])
    assert adapters_of(model)["twin"].tokens == adapters_of(model)["default"].tokens
    expected = output(model, batch())
    model.set_adapter("twin")
    assert torch.equal(output(model, batch()), expected)


def test_trls_fused_head_is_refused_and_ours_learns_to_emit_a_marker(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from adapters.train import SFTTrainer

    tokenizer = chat.letters(chat.CHATML, eos_token="<|im_end|>", pad_token="<s>")
    model = llama(tied=True, vocabulary=264)
    adapters.add_tokens(model, tokenizer, ["<tool>"])
    number = tokenizer.get_vocab()["<tool>"]
    rows = [
        {
            "prompt": [{"role": "user", "content": word}],
            "completion": [{"role": "assistant", "content": f"<tool>{word}"}],
        }
        for word in ("ant", "bee", "cow", "dog")
    ]
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "learning_rate": 2e-2, "max_steps": 40}
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = trl.SFTConfig(str(tmp_path), **settings, **quiet, bf16=False, gradient_checkpointing=False, logging_steps=1)
    adapters.attach(model, "lora", name="default", tokens=["<tool>"], tokenizer=tokenizer, targets=["attention.value"])
    table = model.lm_head._parameters["weight"].detach().clone()
    fused = trl.SFTTrainer(model, args, train_dataset=_dataset(rows), processing_class=tokenizer)
    with pytest.raises(AdapterError, match=r"tokens= out, or use adapters\.train\.SFTTrainer"):
        fused.train()
    model.__dict__.pop("forward", None)  # the head that TRL has put on
    prompt = tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    asked = {"input_ids": prompt, "max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    assert number not in model.eval().generate(**asked)[0, prompt.shape[1] :]
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert model.eval().generate(**asked)[0, prompt.shape[1]] == number
    assert torch.equal(model.lm_head._parameters["weight"], table)
    with adapters.using(model, None):
        assert number not in model.generate(**asked)[0, prompt.shape[1] :]


def _dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


def _two(rank: int, folder: str) -> None:
    """One of two processes: FSDP2 trains as one process does, tensor parallelism is refused."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meet")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for tied in (True, False):
        grads = []
        for sharded in (False, True):
            model = llama(tied).train()
            torch.manual_seed(3)
            adapters.attach(model, "lora", name="fr", tokens=IDS)
            shake(model, "fr")
            for part in (*model.model.layers, model) if sharded else ():
                fully_shard(part, mesh=mesh)
            model(**batch(), labels=batch()["input_ids"]).loss.backward()
            found = {key: tensor.grad for key, tensor in tensors_of(model, "fr").items()}
            assert all(isinstance(grad, DTensor) == sharded for grad in found.values())
            grads.append({key: grad.full_tensor() if sharded else grad for key, grad in found.items()})
        for key, grad in grads[0].items():
            assert grad.norm() > 0
            torch.testing.assert_close(grads[1][key], grad, rtol=1e-5, atol=1e-6)
        adapters.save(model, "fr", f"{folder}/{tied}")
    composed = llama()
    for seed, name in enumerate(("de", "it")):
        adapters.attach(composed, "lora", name=name)
        shake(composed, name, seed=seed)
    adapters.compose(composed, "both", Average("de", "it", weights=[0.25, 0.75]))
    adapters.activate(composed, "both")
    expected = output(composed, batch())
    for part in (*composed.model.layers, composed):
        fully_shard(part, mesh=mesh)
    report = adapters.save(composed, "both", f"{folder}/both")  # all call, and one writes: once
    dist.barrier()
    assert set(report.files) == set(os.listdir(report.folder))
    again = llama()
    adapters.load(again, report.folder)
    assert relative(expected, output(llama(), batch())) > 1e-3
    torch.testing.assert_close(output(again, batch()), expected, rtol=1e-5, atol=1e-6)
    split = llama()
    adapters.attach(split, "lora", name="fr", tokens=IDS, targets=["attention.value"])
    divided = distribute_tensor(split.lm_head._parameters["weight"].detach(), mesh, [Shard(0)])
    split.lm_head._parameters["weight"] = torch.nn.Parameter(divided, requires_grad=False)
    with pytest.raises(AdapterError, match=r"lm_head\.weight is split over processes by tensor parallelism"):
        split(**batch())
    dist.barrier()
    dist.destroy_process_group()


def test_rows_train_on_two_processes_as_on_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_two, (str(tmp_path),), nprocs=2)
    for tied in (True, False):
        model, loaded = llama(tied), llama(tied)
        torch.manual_seed(3)
        adapters.attach(model, "lora", name="fr", tokens=IDS)
        shake(model, "fr")
        adapters.load(loaded, tmp_path / str(tied))
        assert torch.equal(output(loaded, batch()), output(model, batch()))


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix"])
def test_smollm2_learns_a_marker(method: str, tmp_path: Path) -> None:
    """A new token is trained with an adapter, emitted, saved, loaded on a fresh base, and merged."""
    texts = ["The capital of France is", "Water boils at one hundred degrees and"]

    def fresh() -> tuple[Any, Any]:
        model, tokenizer = adapters.load_base("smollm2-135m-instruct", dtype=torch.float32)
        report = adapters.add_tokens(model, tokenizer, ["<|lookup|>"])
        assert set(report.resized.values()) == {(49152, 49153)}
        return model.eval(), tokenizer

    model, tokenizer = fresh()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    base = output(frozen(model), tokenizer(texts[0], return_tensors="pt"))
    options = {"lora": {"targets": ["attention.value"]}, "bottleneck": {}, "prefix": {"length": 4}}[method]
    adapters.attach(model, method, name="fr", tokens=["<|lookup|>"], tokenizer=tokenizer, **options)
    if method != "prefix":
        assert torch.equal(output(model, tokenizer(texts[0], return_tensors="pt")), base)
    ids = [tokenizer(f"{text}<|lookup|>", return_tensors="pt")["input_ids"] for text in texts]
    assert ids[0][0, -1] == 49152
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(12):
        loss = sum(cross_entropy(model(input_ids=x).logits[0, -2:-1], x[0, -1:]) for x in ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prompt = tokenizer(texts[0], return_tensors="pt")
    asked = {**prompt, "max_new_tokens": 1, "do_sample": False}
    assert model.generate(**asked)[0, -1] == 49152
    adapters.save(model, "fr", tmp_path)
    expected = output(model, {"input_ids": ids[1]})
    again, _ = fresh()
    adapters.load(again, tmp_path)
    assert torch.equal(output(again, {"input_ids": ids[1]}), expected)
    if method == "lora":
        assert adapters.merge(again, "fr", example={"input_ids": ids[1]}).error < 1e-4
        assert again.generate(**asked)[0, -1] == 49152
    adapters.activate(model, None)
    assert torch.equal(output(model, prompt), base)
