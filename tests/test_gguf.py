"""GGUF files against what llama.cpp's own conversion defines, written down by hand for tiny models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat
import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf.quants import quantize
from laws import shake
from torch import Tensor, nn

import adapters
from adapters._attach import tensors_of
from adapters._gguf import layout as gguf_layout
from adapters._gguf.layout import interleaved

# llama.cpp's names (gguf-py, constants.py) of a Llama's weights
LLAMA = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
FIELDS = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores", "llama.vocab_size")


def permuted(w: Tensor, heads: int) -> Tensor:
    """LlamaModel.permute, row by row: half j, row i of a head comes to its place 2 i + j."""
    half = w.shape[0] // heads // 2
    out = torch.empty_like(w)
    for head in range(heads):
        for j in range(2):
            for i in range(half):
                out[head * 2 * half + 2 * i + j] = w[head * 2 * half + j * half + i]
    return out


def expected(model: Any) -> dict[str, Tensor]:
    """A tiny Llama's tensors as llama.cpp stores them."""
    found = {"token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": model.model.norm.weight}
    found["output.weight"] = model.lm_head.weight
    for i, layer in enumerate(model.model.layers):
        for path, name in LLAMA.items():
            w = layer.get_submodule(path).weight.detach()
            heads = {"attn_q": tiny.HEADS, "attn_k": tiny.KV_HEADS}.get(name)
            found[f"blk.{i}.{name}.weight"] = permuted(w, heads) if heads else w
    return {name: w.detach().clone() for name, w in found.items()}


def write_base(path: Path, model: Any, kind: str = "F32") -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_token_list([f"w{i}" for i in range(tiny.VOCAB)])
    writer.add_file_type(2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    for name, w in expected(model).items():
        chosen = gguf.GGMLQuantizationType[kind if w.dim() > 1 else "F32"]
        writer.add_tensor(name, quantize(w.float().numpy(), chosen), raw_dtype=chosen)
    writer.add_tensor("rope_freqs.weight", np.arange(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> tuple[gguf.GGUFReader, dict[str, Tensor]]:
    reader = gguf.GGUFReader(path)
    held = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    return reader, held


def adapted(method: str = "lora", **options: Any) -> Any:
    model = tiny.build("llama")
    adapters.attach(model, method, name="fr", **options)
    shake(model, "fr")
    return model


def test_rows_are_interleaved_head_by_head() -> None:
    w = torch.randn(24, 5)
    assert torch.equal(interleaved(w, 3), permuted(w, 3))
    assert not torch.equal(interleaved(w, 3), interleaved(w, 2))


@pytest.mark.parametrize("proved", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3, "alpha": 5.0},
        {"rank": 4, "alpha": 2.0, "rslora": True},
        {"rank": 4, "rank_pattern": {"*q_proj*": 2}, "alpha_pattern": {"*up_proj*": 7.0}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_an_adapter_adds_what_it_added(options: dict[str, Any], proved: bool, tmp_path: Path) -> None:
    model = adapted(**options)
    base = write_base(tmp_path / "base.gguf", tiny.build("llama")) if proved else None
    report = adapters.export_gguf(model, "fr", tmp_path / "fr.gguf", base)
    reader, held = read(tmp_path / "fr.gguf")
    assert [reader.get_field(key).contents() for key in ("general.type", "adapter.type")] == ["adapter", "lora"]
    assert reader.get_field("general.architecture").contents() == "llama"
    alpha = reader.get_field("adapter.lora.alpha").contents()
    before = expected(model)
    adapters.merge(model, "fr")
    after = expected(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[0] for name in held} == changed
    for name in changed:
        a, b = held[f"{name}.lora_a"], held[f"{name}.lora_b"]
        change = alpha / b.shape[1] * b @ a  # llama-adapter.cpp: the rank is that of the tensor
        torch.testing.assert_close(before[name] + change, after[name], rtol=1e-5, atol=1e-6)
    assert report.tensors == len(changed) == 14
    assert (report.proof == 0) == proved
    assert any("another scale" in note for note in report.notes) == ("rank_pattern" in options)
    assert any("base_gguf= would prove it" in note for note in report.notes) != proved


def test_a_scale_of_0_adds_nothing(tmp_path: Path) -> None:
    """llama.cpp would take an alpha of 0 for a scale of 1."""
    adapters.export_gguf(adapted(rank=2, alpha=0.0), "fr", tmp_path / "fr.gguf")
    reader, held = read(tmp_path / "fr.gguf")
    assert reader.get_field("adapter.lora.alpha").contents() == 1
    assert not any(tensor.any() for name, tensor in held.items() if name.endswith("lora_b"))
    assert all(tensor.any() for name, tensor in held.items() if name.endswith("lora_a"))


@pytest.mark.parametrize(("kind", "most"), [("F16", 1e-3), ("Q8_0", 0.02), ("Q4_0", 0.15)])
def test_the_bases_file_proves_the_order_in_any_precision(kind: str, most: float, tmp_path: Path) -> None:
    model = adapted(rank=3)
    report = adapters.export_gguf(model, "fr", tmp_path / "fr.gguf", write_base(tmp_path / "base.gguf", model, kind))
    assert report.proof is not None
    assert 0 < report.proof < most
    adapters.export_gguf(model, "fr", tmp_path / "known.gguf")
    assert (tmp_path / "fr.gguf").read_bytes() == (tmp_path / "known.gguf").read_bytes()


def test_a_type_that_is_not_known_needs_the_bases_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(rank=3)
    adapters.export_gguf(model, "fr", tmp_path / "known.gguf")
    monkeypatch.setattr(gguf_layout, "KNOWN", {})
    with pytest.raises(adapters.AdapterError, match=r"'llama' model is not known here: pass base_gguf="):
        adapters.export_gguf(model, "fr", tmp_path / "fr.gguf")
    adapters.export_gguf(model, "fr", tmp_path / "fr.gguf", write_base(tmp_path / "base.gguf", model))
    assert (tmp_path / "fr.gguf").read_bytes() == (tmp_path / "known.gguf").read_bytes()


def other_base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "other.gguf", tiny.build("llama", seed=1))


def no_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "none.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    return path


def existing(tmp_path: Path) -> None:
    (tmp_path / "fr.gguf").write_bytes(b"mine")


REFUSED: list[tuple[dict[str, Any], Callable[[Path], Any], str]] = [
    ({"method": "dora", "rank": 2}, lambda path: None, r"are LoRA, and 'fr' is 'dora': merge it"),
    ({"method": "bottleneck"}, lambda path: None, r"are LoRA, and 'fr' is 'bottleneck'"),
    ({"rank": 2, "bias": True}, lambda path: None, "trains biases"),
    ({"rank": 2, "targets": ["*embed_tokens*"]}, lambda path: None, "is no linear layer of its own"),
    ({"rank": 2}, other_base, "in whatever order its rows are taken: the file is of another base"),
    ({"rank": 2}, no_gguf, "cannot be read as a GGUF file"),
    ({"rank": 2}, existing, "exists already: give a new name"),
]


@pytest.mark.parametrize(("options", "base", "sentence"), REFUSED)
def test_what_llama_cpp_cannot_hold_is_refused(
    options: dict[str, Any], base: Callable[[Path], Any], sentence: str, tmp_path: Path
) -> None:
    model = adapted(**options)
    given = base(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(adapters.AdapterError, match=sentence):
        adapters.export_gguf(model, "fr", tmp_path / "fr.gguf", given)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_names_that_are_not_attached_are_refused(tmp_path: Path) -> None:
    with pytest.raises(adapters.AdapterError, match=r"no adapter 'fx' is attached; did you mean 'fr'\?"):
        adapters.export_gguf(adapted(rank=2), "fx", tmp_path / "fr.gguf")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_merged_model_takes_its_bases_form(kind: str, dtype: str, tmp_path: Path) -> None:
    model = tiny.build("llama")
    base = write_base(tmp_path / "base.gguf", model, kind)
    adapters.attach(model, "lora", name="fr", rank=3)
    shake(model, "fr", noise=0.01)
    adapters.merge(model, "fr")
    report = adapters.export_model(model, tmp_path / "merged.gguf", base, dtype)
    reader, held = read(tmp_path / "merged.gguf")
    wanted = expected(model)
    assert held.keys() == {*wanted, "rope_freqs.weight"}
    for name, w in wanted.items():
        rounded = w.to(getattr(torch, dtype)).float() if w.dim() > 1 else w
        assert torch.equal(held[name], rounded), name
    assert torch.equal(held["rope_freqs.weight"], torch.arange(8).float())
    assert report.copied == ("rope_freqs.weight",)
    assert 0.01 < report.difference < 0.5
    before = gguf.GGUFReader(base)
    for key in ("general.name", "tokenizer.ggml.tokens", "llama.rope.freq_base", "llama.context_length"):
        assert reader.get_field(key).contents() == before.get_field(key).contents()
    assert reader.get_field("general.file_type").contents() == {"float32": 0, "float16": 1, "bfloat16": 32}[dtype]


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_are_written_with_the_model_and_its_tokenizer(tied: bool, tmp_path: Path) -> None:
    """GPT-2's way of splitting and SentencePiece's scores are the base's; what was added follows its own tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {key: getattr(tiny.build("llama").config, key) for key in SIZES}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, "vocab_size": 264, "tie_word_embeddings": tied}))
    writer, base = gguf.GGUFWriter(tmp_path / "base.gguf", "llama"), tmp_path / "base.gguf"
    tokenizer = chat.letters(None)
    special = {number: text for text, number in tokenizer.get_vocab().items() if number >= 256}
    writer.add_token_list([special.get(i, f"w{i}") for i in range(264)])
    writer.add_token_scores([-float(i) for i in range(264)])
    writer.add_token_types([1] * 264)
    writer.add_vocab_size(264)
    for name, w in expected(model).items():
        if not (tied and name == "output.weight"):
            writer.add_tensor(name, w.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapters.add_tokens(model, tokenizer, ["<tool>", "<out>"])
    adapters.add_tokens(model, tokenizer, ["plain"], special=False)
    model.resize_token_embeddings(268, mean_resizing=False)  # a row that no token belongs to
    with pytest.raises(adapters.AdapterError, match=r"the model has 268 tokens and base.gguf 264: pass tokenizer="):
        adapters.export_model(model, tmp_path / "merged.gguf", base, "float32")
    report = adapters.export_model(model, tmp_path / "merged.gguf", base, "float32", tokenizer)
    assert report.tokens == ("<tool>", "<out>", "plain")
    assert "3 new tokens" in str(report)
    reader, held = read(tmp_path / "merged.gguf")
    field = {key: reader.get_field(key).contents() for key in FIELDS}
    assert field["tokenizer.ggml.tokens"][262:] == [special[262], special[263], "<tool>", "<out>", "plain", "[PAD267]"]
    kind = gguf.TokenType
    assert field["tokenizer.ggml.token_type"][263:] == [1, kind.CONTROL, kind.CONTROL, kind.USER_DEFINED, kind.UNUSED]
    assert field["tokenizer.ggml.scores"][262:] == [-262.0, -263.0, *[-1000.0] * 4]
    assert field["llama.vocab_size"] == 268
    assert torch.equal(held["token_embd.weight"], model.model.embed_tokens.weight.detach())
    assert ("output.weight" in held) != tied
    assert tied or torch.equal(held["output.weight"], model.lm_head.weight.detach())
    with torch.no_grad():
        model.model.embed_tokens.weight[:264] = torch.randn(264, tiny.HIDDEN)
    with pytest.raises(adapters.AdapterError, match="the file is of another base"):
        adapters.export_model(model, tmp_path / "other.gguf", base, "float32", tokenizer)


def test_tokens_in_rows_that_were_spare_are_named(tmp_path: Path) -> None:
    """As in bases whose tables are padded: the file has entries for them that no token belongs to."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {key: getattr(tiny.build("llama").config, key) for key in SIZES}
    torch.manual_seed(0)
    model, tokenizer = LlamaForCausalLM(LlamaConfig(**{**sizes, "vocab_size": 268})), chat.letters(None)
    writer, base = gguf.GGUFWriter(tmp_path / "base.gguf", "llama"), tmp_path / "base.gguf"
    numbers = {number: text for text, number in tokenizer.get_vocab().items()}
    kind = gguf.TokenType
    writer.add_token_list([*(numbers[i] for i in range(264)), *(f"[PAD{i}]" for i in range(264, 268))])
    writer.add_token_types([*[int(kind.NORMAL)] * 264, *[int(kind.UNUSED)] * 4])
    for name, w in expected(model).items():
        writer.add_tensor(name, w.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert adapters.export_model(model, tmp_path / "plain.gguf", base, "float32", tokenizer).tokens == ()
    adapters.add_tokens(model, tokenizer, ["<tool>", "<out>"])
    report = adapters.export_model(model, tmp_path / "merged.gguf", base, "float32", tokenizer)
    assert report.tokens == ("<tool>", "<out>")
    reader, _ = read(tmp_path / "merged.gguf")
    assert reader.get_field("tokenizer.ggml.tokens").contents()[263:] == [
        numbers[263],
        "<tool>",
        "<out>",
        "[PAD266]",
        "[PAD267]",
    ]
    found = reader.get_field("tokenizer.ggml.token_type").contents()[263:]
    assert found == [kind.NORMAL, kind.CONTROL, kind.CONTROL, kind.UNUSED, kind.UNUSED]
    other = chat.letters(None)
    other.add_tokens(["<tool>"], special_tokens=True)
    described = json.loads(other.backend_tokenizer.to_str().replace("<|im_end|>", "<|tm_end|>"))
    other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(described))
    with pytest.raises(adapters.AdapterError, match=r"in base.gguf and .* in the tokenizer: it is of another base"):
        adapters.export_model(model, tmp_path / "other.gguf", base, "float32", other)


def test_norms_that_are_stored_as_one_more_are_recognised(tmp_path: Path) -> None:
    """Gemma's norms multiply by 1 + w, and llama.cpp's by what is in the file (Gemma2Model.modify_tensors)."""
    model = tiny.build("gemma2")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, tiny.LAYERS)
    path = tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(path, "gemma2")
    wanted = {}
    for name, w in model.named_parameters():
        key = names.get_name(name, try_suffixes=(".weight",))
        wanted[key] = w.detach() + 1 if "norm" in name else w.detach()
        writer.add_tensor(key, wanted[key].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapters.attach(model, "lora", name="fr", rank=2)
    shake(model, "fr")
    adapters.export_gguf(model, "fr", tmp_path / "fr.gguf", path)
    adapters.detach(model)
    adapters.export_model(model, tmp_path / "again.gguf", path, "float32")
    _, held = read(tmp_path / "again.gguf")
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[key], w) for key, w in wanted.items())


def attached(model: nn.Module) -> None:
    adapters.attach(model, "lora", name="fr", rank=2)


def quantised(model: nn.Module) -> None:
    adapters.quantize(model)


@pytest.mark.parametrize(
    ("change", "dtype", "sentence"),
    [
        (attached, "float32", "fr is attached: merge it first"),
        (quantised, "float32", "is in 4 bits"),
        (lambda model: None, "int8", "dtype is 'int8'; choose one of float32, float16, bfloat16"),
        (lambda model: model.lm_head.weight.data.normal_(), "float32", "the file is of another base"),
    ],
)
def test_models_that_are_none_of_the_bases_are_refused(
    change: Callable[[Any], Any], dtype: str, sentence: str, tmp_path: Path
) -> None:
    model = tiny.build("llama")
    base = write_base(tmp_path / "base.gguf", model)
    change(model)
    with pytest.raises(adapters.AdapterError, match=sentence):
        adapters.export_model(model, tmp_path / "merged.gguf", base, dtype)
    assert os.listdir(tmp_path) == ["base.gguf"]


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(rank=2)

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapters.export_gguf(model, "fr", tmp_path / "fr.gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_read_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(rank=2)
    inner = gguf.GGUFWriter.add_tensor

    def wrong(self: Any, name: str, tensor: Any, *args: Any, **kwargs: Any) -> None:
        inner(self, name, tensor * 1.001 if name == "blk.1.attn_k.weight.lora_b" else tensor, *args, **kwargs)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", wrong)
    with pytest.raises(adapters.AdapterError, match=r"layers\.1\.self_attn\.k_proj\.weight does not read back"):
        adapters.export_gguf(model, "fr", tmp_path / "fr.gguf")
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_a_base_in_4_bits_says_so(tmp_path: Path) -> None:
    model = tiny.build("llama")
    base = write_base(tmp_path / "base.gguf", model, "Q8_0")
    adapters.attach(model, "qlora", name="fr", rank=2)
    shake(model, "fr")
    report = adapters.export_gguf(model, "fr", tmp_path / "fr.gguf", base)
    assert any("trained on a base in 4 bits" in note for note in report.notes)
    assert report.proof is not None
    assert 0.01 < report.proof < 0.2
    _, held = read(tmp_path / "fr.gguf")
    assert torch.equal(
        held["blk.0.attn_q.weight.lora_a"], tensors_of(model, "fr")["model.layers.0.self_attn.q_proj.weight:a"]
    )
