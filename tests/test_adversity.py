"""Misuse, interruption and odd models: each once gave a wrong number, a silent no-op or a half-changed model."""

from __future__ import annotations

import asyncio
import copy
import gc
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch
import transformers as hf
from laws import assert_same, output, relative, shake, snapshot
from torch import Tensor, nn

import adapters
from adapters._attach import install
from adapters._attach import swap as swap_module

BATCH = tiny.inputs("llama")


def attached(name: str = "llama", method: str = "lora", **options: Any) -> Any:
    model = tiny.build(name)
    adapters.attach(model, method, name="a", **options)
    shake(model, "a")
    return model


def test_a_copy_with_a_prefix_keeps_it_when_the_original_is_gone() -> None:
    model = attached(method="prefix", length=4)
    expected = output(model, BATCH)
    twin = copy.deepcopy(model)
    adapters.detach(model)
    assert torch.equal(output(twin, BATCH), expected)
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    del twin, model
    gc.collect()
    buffer.seek(0)
    assert torch.equal(output(torch.load(buffer, weights_only=False), BATCH), expected)


def test_models_that_pass_the_mask_by_name_are_bystanders_and_take_a_prefix() -> None:
    model = hf.DogeForCausalLM(hf.DogeConfig(**tiny._GROUPED)).eval()
    expected = output(model, BATCH)
    other = attached(method="prefix", length=3)
    assert torch.equal(output(model, BATCH), expected)
    adapters.attach(model, "prefix", name="a", length=3)
    shake(model, "a")
    assert relative(output(model, BATCH), expected) > 1e-3
    adapters.detach(other)
    adapters.detach(model)
    assert torch.equal(output(model, BATCH), expected)


def t5(**more: Any) -> tuple[Any, dict[str, Tensor]]:
    sizes = {"vocab_size": 160, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)).eval()
    return model, {**BATCH, "decoder_input_ids": BATCH["input_ids"][:, :5]}


def test_weights_that_their_parent_reads_are_not_quantised() -> None:
    model, batch = t5()
    expected = output(model, batch)
    report = adapters.quantize(model)
    assert {why for path, why in report.left.items() if path.endswith("wo.weight")} == {"its model keeps it in fp32"}
    assert relative(output(model, batch), expected) < 0.3  # 4-bit noise; codes read as weights give 1.45
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Linear(64, 64)).eval()
    report = adapters.quantize(model)
    assert report.quantized == ("1",)
    assert "0.layers.0.self_attn.out_proj.weight" in report.left
    assert torch.isfinite(model(torch.randn(2, 5, 64))).all()


def test_position_bias_is_extended_for_a_prefix() -> None:
    model, batch = t5()
    adapters.attach(model, "prefix", name="a", length=3)
    before = output(model, batch)
    shake(model, "a")
    assert relative(output(model, batch), before) > 1e-3


@pytest.mark.parametrize("whole", [True, False])
def test_using_holds_for_compiled_code(whole: bool) -> None:
    torch._dynamo.reset()
    model = attached()
    on = output(model, BATCH)
    with adapters.using(model, None):
        off = output(model, BATCH)
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    assert torch.equal(output(model, BATCH), on)
    with adapters.using(model, None):
        assert torch.equal(output(model, BATCH), off)
    assert torch.equal(output(model, BATCH), on)


def test_a_compiled_model_runs_as_its_base_after_detach() -> None:
    torch._dynamo.reset()
    base = output(tiny.build("llama"), BATCH)
    model = attached()
    compiled = torch.compile(model, backend="eager")
    output(compiled, BATCH)
    adapters.detach(compiled)
    assert torch.equal(output(compiled, BATCH), base)


def test_torchs_fused_layers_are_refused() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    before = snapshot(model)
    with pytest.raises(adapters.AdapterError, match="fused path"):
        adapters.attach(model, "lora", example={"src": torch.randn(2, 5, 64)})
    assert_same(snapshot(model), before)


def test_a_site_below_a_trained_head_is_refused() -> None:
    config = hf.RobertaConfig(**{**tiny._BERT, "pad_token_id": 1, "bos_token_id": 0})
    model = hf.RobertaForSequenceClassification(config).eval()
    before = snapshot(model)
    with pytest.raises(adapters.AdapterError, match="trained whole or not adapted"):
        adapters.attach(model, "lora", targets=["*query*", "classifier.*"])
    assert_same(snapshot(model), before)


def test_a_part_and_its_whole_are_not_both_attached_to() -> None:
    model = tiny.build("llama")
    adapters.attach(model.model, "lora", name="a")
    with pytest.raises(adapters.AdapterError, match="its part model"):
        adapters.attach(model, "lora", name="b")
    adapters.detach(model.model)
    adapters.attach(model, "lora", name="b")
    with pytest.raises(adapters.AdapterError, match="a larger model"):
        adapters.attach(model.model, "lora", name="a")
    assert adapters.adapters_of(model.model) == {}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_the_base_model_called_by_itself_moves_positions_as_the_whole_does(name: str) -> None:
    model, batch = attached(name, "prefix", length=4, positions="shifted"), tiny.inputs(name)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True).hidden_states[-1]
        found = model.base_model(**batch).last_hidden_state
    assert relative(found, expected) < 1e-6


def test_position_ids_given_by_position_are_moved_too() -> None:
    model = attached(method="prefix", length=4, positions="shifted")
    ids = torch.arange(7)[None].expand(3, -1)
    with torch.no_grad():
        found = model(BATCH["input_ids"], BATCH["attention_mask"], ids).logits
    assert torch.equal(found, output(model, {**BATCH, "position_ids": ids}))
    assert relative(found, output(model, BATCH)) < 1e-6


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_experts_see_dropout_and_equal_the_dense_weight(experts: str) -> None:
    model = attached("qwen3_moe", dropout=0.5, targets="*experts*", rank=4)
    model.set_experts_implementation(experts)
    merged = copy.deepcopy(model)
    adapters.merge(merged, "a")
    still = output(model, BATCH)
    assert relative(still, output(merged, BATCH)) < 1e-5
    model.train()
    assert not torch.equal(output(model, BATCH), output(model, BATCH))


def test_what_a_hook_returns_or_keeps_is_not_written_into() -> None:
    model = attached(targets="*down_proj*")
    constant = torch.randn(3, 7, 64)
    before = constant.clone()
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, y: constant)
    output(model, BATCH)
    handle.remove()
    assert torch.equal(constant, before)
    kept: list[Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, y: kept.append(y.pow(2)))
    model(**BATCH).logits.sum().backward()
    kept[0].sum()


def test_coroutines_and_generators_keep_their_own_choice() -> None:
    model = attached()
    adapters.attach(model, "lora", name="b")
    shake(model, "b", 5)
    expected = {}
    for name in ("a", "b"):
        with adapters.using(model, name):
            expected[name] = output(model, BATCH)

    async def ask(name: str) -> bool:
        with adapters.using(model, name):
            await asyncio.sleep(0)
            found = output(model, BATCH)
            await asyncio.sleep(0)
        return torch.equal(found, expected[name])

    async def together() -> list[bool]:
        return await asyncio.gather(*(ask(name) for name in ("a", "b", "a", "b")))

    assert asyncio.run(together()) == [True] * 4


@dataclass(frozen=True)
class Narrow(adapters.WeightMethod):
    """Narrow: a mistake, one row in place of all."""

    name: ClassVar[str] = "narrow"

    def init(self, site: adapters.WeightSite, w: adapters.Weight) -> dict[str, Tensor]:
        return {"s": torch.zeros(site.n_in)}

    def weight(self, w: Tensor, p: Any) -> Tensor:
        return w[:1] * (1 + p["s"])


@dataclass(frozen=True)
class Named(Narrow):
    """Named: tensors called like what the engine holds."""

    name: ClassVar[str] = "named"

    def init(self, site: adapters.WeightSite, w: adapters.Weight) -> dict[str, Tensor]:
        return {"w": torch.zeros(site.n_in)}


def test_a_plugin_that_makes_another_shape_or_takes_a_name_is_told_so() -> None:
    model = tiny.build("llama")
    adapters.attach(model, Narrow(), name="a", targets="mlp.up")
    with pytest.raises(adapters.AdapterError, match=r"shape \(1, 64\) from one of \(128, 64\)"):
        model(**BATCH)
    adapters.detach(model)
    before = snapshot(model)
    with pytest.raises(adapters.AdapterError, match="cannot call a tensor 'w'"):
        adapters.attach(model, Named(), name="a", targets="mlp.up")
    assert_same(snapshot(model), before)


def test_the_certificate_is_measured_without_dropout_and_flags_come_back() -> None:
    model = attached(dropout=0.5)
    model.train()
    flags = {path: module.training for path, module in model.named_modules() if "adapters" not in path}
    certificate = adapters.merge(model, "a")
    assert all(site.seen is not None and site.seen < 1e-5 for site in certificate.sites)
    assert {path: module.training for path, module in model.named_modules()} == flags


@pytest.mark.parametrize(
    "wrong",
    [{"targets": ["nope"]}, {"head": ["nope"]}, {"dtype": torch.int8}, {"rank": 0}],
    ids=lambda w: next(iter(w)),
)
def test_a_refused_qlora_leaves_the_base_dense(wrong: dict[str, Any]) -> None:
    model = tiny.build("llama")
    before = snapshot(model)
    with pytest.raises(adapters.AdapterError):
        adapters.attach(model, "qlora", **wrong)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_classifier"])
def test_a_qlora_on_an_fp32_base_merges_into_an_fp32_model(name: str) -> None:
    model, batch = tiny.build(name), tiny.inputs(name)
    adapters.attach(model, "qlora", name="a")
    shake(model, "a")
    adapted = output(model, batch)
    adapters.merge(model, "a", example=batch)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert relative(output(model, batch), adapted) < 2e-2  # the adapted model multiplied in bf16


def test_requantising_is_checked_before_anything_changes() -> None:
    model = attached()
    before = snapshot(model)
    for wrong, sentence in (("int8", "no quantisation 'int8'"), ("nf4", "not quantised")):
        with pytest.raises(adapters.AdapterError, match=sentence):
            adapters.merge(model, "a", requantize=wrong)
        assert_same(snapshot(model), before)


@pytest.mark.parametrize("moment", [1, 3, 6, 10])
@pytest.mark.parametrize("function", ["add_faces", "strip"])
def test_an_interrupt_can_be_answered_by_trying_again(
    function: str, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("llama")
    before = snapshot(model)
    original, calls = getattr(swap_module, function), []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == moment:
            raise KeyboardInterrupt
        return original(*args)

    import adapters._attach.entries as entries

    act: Callable[[], Any]
    if function == "strip":
        adapters.attach(model, "lora", name="a")
        act = lambda: adapters.detach(model)  # noqa: E731
    else:
        act = lambda: adapters.attach(model, "lora", name="a")  # noqa: E731
    for module in (install.__globals__, vars(entries)):
        monkeypatch.setitem(module, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        act()
    adapters.detach(model)
    assert_same(snapshot(model), before)


def test_a_child_called_adapters_is_refused_even_when_it_is_none() -> None:
    model = tiny.build("llama")
    model.model.layers[1].mlp.up_proj.adapters = None
    before = snapshot(model)
    with pytest.raises(adapters.AdapterError, match="attribute 'adapters' of its own"):
        adapters.attach(model, "lora")
    assert_same(snapshot(model), before)


def test_a_head_follows_its_models_dtype() -> None:
    model, batch = attached("bert_classifier"), tiny.inputs("bert_classifier")
    expected = output(model, batch)
    model.bfloat16()
    assert relative(output(model, batch), expected) < 5e-2


@dataclass(frozen=True)
class Ones(adapters.KeyValueMethod):
    """Ones: keys and values that start as ones."""

    name: ClassVar[str] = "ones"

    def start(self) -> int:
        return 2

    def init(self, site: adapters.KeyValueSite, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {"k": torch.ones_like(keys), "v": torch.ones_like(values)}

    def prefix(self, p: Any) -> tuple[Tensor, Tensor]:
        return p["k"], p["v"]


def test_a_plugin_can_be_a_prefix() -> None:
    model = tiny.build("llama")
    base = output(model, BATCH)
    adapters.attach(model, Ones(), name="a")
    assert adapters.adapters_of(model)["a"].method.length == 2  # type: ignore[attr-defined]
    assert relative(output(model, BATCH), base) > 1e-3


def test_quantising_keeps_hooks_and_modules_under_two_paths() -> None:
    model = tiny.build("llama")
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    seen: list[int] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    adapters.quantize(model)
    assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj
    seen.clear()  # quantising traces a forward
    output(model, BATCH)
    assert len(seen) == 2


def test_a_large_output_hides_no_small_one_that_a_merge_changes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.second(self.first(x))
            return {"large": 1e4 + 0 * y, "y": y}

    torch.manual_seed(0)
    model, x = Two().to(torch.bfloat16), torch.randn(3, 16, dtype=torch.bfloat16)
    adapters.attach(model, "lora", name="fr", rank=2, example={"x": x}, targets=["first", "second"])
    shake(model, "fr")
    before = model(x)["y"]
    certificate = adapters.merge(model, "fr", example={"x": x})
    assert certificate.error == pytest.approx(relative(model(x)["y"], before), rel=1e-4)
    assert certificate.error > 1e-4


def test_merging_a_head_tied_to_the_embeddings_names_the_tie() -> None:
    model = tiny.build("gemma2")
    adapters.attach(model, "lora", name="a", head=["lm_head"])
    with pytest.raises(adapters.AdapterError, match="tied to the embeddings"):
        adapters.merge(model, "a")
