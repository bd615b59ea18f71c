"""What single architectures of the matrix taught, each as a rule that must hold by itself."""

from __future__ import annotations

import copy
import functools
import gc
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from laws import frozen, output, relative, shake
from torch import Tensor, nn

import adapters
from adapters._attach import adapters_of, tensors_of
from adapters._errors import AdapterError
from tests.matrix.build import build
from tests.matrix.pairs import Pair, pairs

CLOSE = 1e-5


@functools.cache
def pair_of(type_: str, head: str) -> Pair:
    return next(pair for pair in pairs() if (pair.type, pair.head) == (type_, head))


def made(type_: str, head: str) -> tuple[Any, dict[str, Any]]:
    return build(pair_of(type_, head))


class Words:
    """A tokenizer whose words are the token ids themselves."""

    def __call__(self, text: str, **kwargs: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}


# -- prefixes


@pytest.mark.parametrize(("type_", "where"), [("bloom", "keyvalue"), ("mpt", "keyvalue"), ("codegen", "keyvalue")])
def test_a_prefix_in_a_written_attention_has_keys_and_values_of_its_text(type_: str, where: str) -> None:
    model, batch = made(type_, "causal")
    text = [9, 77, 31, 60]
    report = adapters.attach(model, "prefix", name="fr", text=" ".join(map(str, text)), tokenizer=Words())
    assert set(report.sites) == {where}
    # what the first layer's attention computes for the text by itself, at the positions that the prefix was given
    again, _ = made(type_, "causal")
    adapters.attach(again, "prefix", name="twice", text=" ".join(map(str, text)), tokenizer=Words())
    other, _ = made(type_, "causal")
    adapters.attach(other, "prefix", name="other", text="9 77 31 61", tokenizer=Words())
    held, same, apart = tensors_of(model, "fr"), tensors_of(again, "twice"), tensors_of(other, "other")
    first = next(iter(held))
    assert all(torch.equal(held[key], same[key]) for key in held)
    assert torch.equal(held[first][..., :3, :], apart[first][..., :3, :])
    assert not torch.equal(held[first][..., 3, :], apart[first][..., 3, :])
    assert torch.isfinite(output(model, batch)).all()


@pytest.mark.parametrize("type_", ["codegen", "gpt_neo", "gptj", "mamba", "rwkv"])
def test_a_prefix_starts_as_its_text_in_front_of_the_input(type_: str) -> None:
    """Also where attention is written out, and where there is none. (ALiBi's distances no key can stand for: bloom.)"""
    model, batch = made(type_, "causal")
    ids = batch["input_ids"]
    text = [9, 77, 31]
    expected = output(model, {"input_ids": torch.cat([torch.tensor([text]).expand(len(ids), -1), ids], 1)})[:, 3:]
    adapters.attach(model, "prefix", name="fr", text=" ".join(map(str, text)), tokenizer=Words())
    assert relative(output(model, {"input_ids": ids}), expected) < CLOSE


def test_two_attentions_in_one_module_take_no_prefix_and_say_so() -> None:
    model, _ = made("prophetnet", "causal")
    with pytest.raises(AdapterError, match="it attends 2 times in one forward"):
        adapters.attach(model, "prefix", length=2)
    assert "takes no prefix: it attends 2 times" in adapters.explain(model, "prophetnet.decoder.layers.0.self_attn")
    assert "takes no prefix" in str(adapters.sites(model))
    with pytest.raises(AdapterError, match="can take no prefix: it attends 2 times"):
        adapters.attach(model, "prefix", length=2, targets=["*.self_attn"])
    assert adapters_of(model) == {}


def test_virtual_tokens_that_no_token_would_meet_are_refused() -> None:
    """MRA attends in a CUDA kernel and returns zeros without it; FNet's tokens meet in a Fourier transform."""
    alone, _ = made("mra", "masked")
    with pytest.raises(AdapterError, match="no token meets another"):
        adapters.attach(alone, "prefix", length=2)
    mixing, batch = made("fnet", "masked")
    before = output(mixing, batch)
    adapters.attach(mixing, "prefix", name="fr", length=2)
    shake(mixing, "fr")
    assert relative(output(mixing, batch), before) > 1e-3


class OverDepth(nn.Module):
    """Each token attends to what two layers made of it, and to no other token."""

    def __init__(self) -> None:
        super().__init__()
        self.ask, self.tell, self.out = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, early: Tensor, late: Tensor) -> Tensor:
        both = torch.stack([early, late], -2)
        scores = self.ask(late).unsqueeze(-2) @ self.tell(both).transpose(-1, -2)
        mixed: Tensor = self.out((scores.softmax(-1) @ both).squeeze(-2))
        return mixed


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.low, self.mix, self.head = (
            nn.Embedding(200, 24),
            nn.Linear(24, 24),
            OverDepth(),
            nn.Linear(24, 200),
        )

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.table(input_ids)
        return {"logits": self.head(x + self.mix(x, x + self.low(x).tanh()))}


def test_attention_over_depth_is_no_place_for_a_prefix() -> None:
    assert adapters.sites(Deep()).keyvalues == ()


def test_a_prefix_is_started_where_negative_positions_are_not_finite() -> None:
    """Mistral-4 scales its queries by the logarithm of their positions."""
    model, batch = made("mistral4", "token")
    report = adapters.attach(model, "prefix", name="fr", length=3)
    assert "nothing finite at negative positions" in str(report)
    assert adapters_of(model)["fr"].method.positions == "shifted"
    ids = batch["input_ids"]
    neutral = torch.full((len(ids), 3), 1)
    plain, _ = made("mistral4", "token")
    expected = output(plain, {"input_ids": torch.cat([neutral, ids], 1)})[:, 3:]
    assert relative(output(model, {"input_ids": ids}), expected) < CLOSE


@pytest.mark.parametrize("type_", ["mamba", "rwkv"])
def test_virtual_tokens_are_there_while_generating_and_behind_padding(type_: str) -> None:
    model, batch = made(type_, "causal")
    adapters.attach(model, "prefix", name="fr", length=3)
    shake(model, "fr")
    ids = batch["input_ids"][:1, :5]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    grown = ids
    for _ in range(5):  # by the definition: the whole row anew for every token
        grown = torch.cat([grown, output(model, {"input_ids": grown})[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, grown)
    alone = output(model, {"input_ids": ids})
    padded = {"input_ids": torch.cat([ids.new_zeros(1, 3), ids], 1)}
    padded["attention_mask"] = (torch.arange(8) >= 3).long()[None]
    behind = output(model, padded)[:, 3:]
    with adapters.using(model, None):
        plain = output(model, {"input_ids": ids})
        if relative(output(model, padded)[:, 3:], plain) < CLOSE:  # RWKV sees what its mask hides, by itself
            assert relative(behind, alone) < CLOSE
    assert relative(plain, alone) > 1e-3


# -- streams and weights


def test_of_two_branches_that_one_module_returns_the_larger_is_adapted_and_the_other_reported() -> None:
    model, _ = made("pegasus_x", "seq2seq")
    found = adapters.sites(model)
    paths = Counter(site.path for site in found.streams)
    assert max(paths.values()) == 1
    assert any("the smaller of the attention branches" in left.reason for left in found.unplaced)
    assert any("unplaced" in line or "smaller of" in line for line in str(found).splitlines())


def test_a_part_that_is_called_like_the_base_is_not_taken_for_it() -> None:
    """DINOv3's bare model calls its layers `model`; its embeddings lie beside them and are no head."""
    model, _ = made("dinov3_vit", "encoder")
    report = adapters.attach(model, "lora", name="fr")
    assert not report.head
    assert all(":head." not in key for key in tensors_of(model, "fr"))


def test_convolutions_are_adapted_where_a_model_has_nothing_else() -> None:
    alone, _ = made("mobilenet_v1", "image")
    kernels = [site for site in adapters.sites(alone).weights if site.folded]
    assert len(kernels) > 20
    assert all(site.default for site in kernels)
    beside, _ = made("vit", "image")
    (patches,) = [site for site in adapters.sites(beside).weights if site.folded]
    assert not patches.default
    assert "beside linear weights" in patches.reason


def test_a_container_does_not_count_the_adapters_it_holds() -> None:
    """ResNet's stages are Sequentials that are iterated over; one that is adapted itself still has as many members."""
    model, batch = made("resnet", "image")
    before = output(frozen(model), batch)
    sizes = {path: len(m) for path, m in model.named_modules() if isinstance(m, nn.Sequential)}
    adapters.attach(model, "bottleneck", name="fr")
    assert {path: len(model.get_submodule(path)) for path in sizes} == sizes
    assert torch.equal(output(model, batch), before)
    shake(model, "fr")
    assert relative(output(model, batch), before) > 1e-3


class Hidden(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.inner(input_ids).last_hidden_state
        return states


class Passed(nn.Sequential):
    """A root that runs all of its named children one after another, as a SentenceTransformer does."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        passed = input_ids
        for _, module in self.named_children():
            passed = module(passed)
        return passed


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_a_root_that_runs_its_children_has_no_further_one(method: str, tmp_path: Path) -> None:
    def model() -> Passed:
        torch.manual_seed(0)
        return Passed(Hidden(made("bert", "encoder")[0]), nn.LayerNorm(tiny.HIDDEN)).eval()

    batch = {"input_ids": torch.arange(12).view(2, 6)}
    trained, served = model(), model()
    adapters.attach(trained, method, name="fr", example=batch)
    shake(trained, "fr")
    adapters.save(trained, "fr", tmp_path)
    adapters.load(served, tmp_path)
    assert [name for name, _ in served.named_children()] == ["0", "1"]
    expected = trained(**batch)
    assert relative(expected, model()(**batch)) > 1e-3
    torch.testing.assert_close(served(**batch), expected, rtol=1e-6, atol=1e-6)
    moved = served.double()(**batch)  # frozen tensors are in memory that no child of the root holds
    assert moved.dtype == torch.float64
    torch.testing.assert_close(moved, trained.double()(**batch), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("type_", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "llama4_text"])
def test_all_experts_are_adapted_by_default(type_: str) -> None:
    model, _ = made(type_, "causal")
    experts = {path: len(p) for path, p in model.named_parameters() if ".experts." in path and p.dim() == 3}
    assert len(experts) >= 2
    report = adapters.attach(model, "lora", name="fr", rank=2)
    for path, count in experts.items():
        a, b = (tensors_of(model, "fr")[f"{path}:{key}"] for key in "ab")
        assert len(a) == len(b) == count
    assert report.share > 0.5


# -- rows


def test_the_probe_says_where_the_rows_of_a_batch_are() -> None:
    """By hand, from the modeling files: where a batch is turned, flattened, sorted by expert or cut into windows."""
    rows = {
        ("llama", "causal"): {"model.layers.0.self_attn.q_proj.weight": ("axis", 0)},
        ("fsmt", "seq2seq"): {"model.encoder.layers.0.fc1.weight": ("axis", 1)},
        ("xlnet", "causal"): {"transformer.layer.0.ff.layer_1.weight": ("axis", 1)},
        ("qwen3_moe", "causal"): {
            "model.layers.0.mlp.gate.weight": ("flattened", 0),
            "model.layers.0.mlp.experts.gate_up_proj": ("routed", 0),
        },
        ("swin", "image"): {"swin.encoder.layers.0.blocks.0.attention.q_proj.weight": ("windowed", 0)},
    }
    for (type_, head), expected in rows.items():
        found = {site.path: site.rows for site in adapters.sites(made(type_, head)[0]).weights}
        for path, (layout, axis) in expected.items():
            assert found[path].layout == layout, (path, found[path])
            assert found[path].axis == axis or layout == "routed", (path, found[path])


# -- maps


def test_a_saved_map_needs_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("qwen3_moe")
    adapters.sites(model).save(tmp_path / "map.json")
    adapters.attach(model, "lora", name="fr", rank=4)
    shake(model, "fr")
    adapters.save(model, "fr", tmp_path / "fr")
    traced: list[Any] = []
    monkeypatch.setattr("adapters._attach.verbs.trace", lambda *given: traced.append(given))
    fresh = tiny.build("qwen3_moe")
    adapters.attach(fresh, "lora", name="de", rank=4, sites=adapters.SiteMap.load(tmp_path / "map.json"))
    loaded = tiny.build("qwen3_moe")
    adapters.load(loaded, tmp_path / "fr", name="fr")
    adapters.attach(loaded, "bottleneck", name="more")  # the adapter brought the map along
    assert not traced
    assert {site.path for site in adapters_of(fresh)["de"].sites} == {s.path for s in adapters_of(model)["fr"].sites}


def test_a_map_of_another_class_or_size_is_refused() -> None:
    llama, qwen = tiny.build("llama"), tiny.build("qwen3")
    with pytest.raises(AdapterError, match="is that of a LlamaForCausalLM, and this model is a Qwen3ForCausalLM"):
        adapters.attach(qwen, "lora", sites=adapters.sites(llama))
    wider = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=160, hidden_size=96, num_attention_heads=4, intermediate_size=128, num_hidden_layers=2
        )
    )
    with pytest.raises(AdapterError, match="the adapter was made for"):
        adapters.attach(wider, "lora", sites=adapters.sites(llama))
    assert adapters_of(wider) == {}


@pytest.mark.parametrize("type_", ["bloom", "mpnet"])
def test_a_base_in_four_bits_has_the_same_map_where_attention_is_written_out(type_: str) -> None:
    pytest.importorskip("bitsandbytes")
    head = "causal" if type_ == "bloom" else "masked"
    model, _ = made(type_, head)
    before = adapters.sites(model)
    assert before.keyvalues
    report = adapters.quantize(model, "nf4")
    assert report.fraction > 0.3
    assert adapters.sites(model) == before


def test_quantising_takes_the_example_that_the_probe_cannot_make() -> None:
    pytest.importorskip("bitsandbytes")

    class Own(nn.Linear):
        """A subclass that only multiplies, as running it tells."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Unusual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Own(64, 128), nn.Linear(128, 64)

        def forward(self, signal: Tensor) -> Tensor:
            x: Tensor = signal + self.second(self.first(signal).relu())
            return x

    model, signal = Unusual(), torch.randn(2, 5, 64)
    blind = adapters.quantize(copy.deepcopy(model), "nf4")
    assert blind.quantized == ("second",)
    assert any("only torch's own linear layers" in note for note in blind.notes)
    expected = model(signal)
    report = adapters.quantize(model, "nf4", compute_dtype=torch.float32, example={"signal": signal})
    assert report.quantized == ("first", "second")
    assert not report.notes
    assert 1e-3 < relative(model(signal), expected) < 0.15


def test_the_time_to_trace_and_to_attach_grows_with_the_layers_and_no_faster() -> None:
    def seconds(layers: int) -> tuple[float, float]:
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=100,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
        started = time.process_time()
        found = adapters.sites(model)
        between = time.process_time()
        adapters.attach(model, "lora", rank=2, sites=found)
        return between - started, time.process_time() - between

    def fastest(layers: int) -> tuple[float, float]:
        """Of two runs each; a collection of the garbage of other tests is no part of either."""
        gc.collect()
        gc.disable()
        try:
            runs = [seconds(layers) for _ in range(2)]
        finally:
            gc.enable()
        return min(trace for trace, _ in runs), min(attach for _, attach in runs)

    fastest(2)
    shallow, deep = fastest(60), fastest(120)
    assert deep[0] < 2.8 * shallow[0]  # 2 if linear, 4 if quadratic
    assert deep[1] < 2.8 * shallow[1]
    assert deep[1] < deep[0]  # what a map saves is the larger part


def test_tokens_that_are_not_told_where_they_are_cannot_be_shifted() -> None:
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 64}
    model = hf.BartForCausalLM(hf.BartConfig(**sizes, encoder_attention_heads=2, encoder_layers=1)).eval()
    before = dict(model.named_parameters())
    with pytest.raises(AdapterError, match=r"the forward of a BartForCausalLM does not take.*positions='before'"):
        adapters.attach(model, "prefix", name="fr", length=3, positions="shifted")
    assert dict(model.named_parameters()) == before
    adapters.attach(model, "prefix", name="fr", length=3)
