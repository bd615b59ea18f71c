"""Bases in 8 bits: against codes times scales, and against dense twins that hold those."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import eightbit
import pytest
import tiny
import torch
from laws import LAWS, Case, assert_same, output, relative, shake, shake_trained, snapshot
from torch import Tensor, nn

import adapters
from adapters._attach import tensors_of
from adapters._coded import bits_of, decoded, format_of, is_coded
from adapters._eightbit import codes_and_scales, unrounded
from adapters._errors import DamagedAdapter, WrongBase
from adapters._sites.unreadable import unreadable
from adapters._store import check, fingerprint, verdicts

bnb = pytest.importorskip("bitsandbytes")

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 4, "alpha": 6.0}),
    "dora": ("dora", {"rank": 4, "alpha": 6.0}),
    "ia3": ("ia3", {}),
    "bottleneck": ("bottleneck", {"reduction_factor": 6.0, "activation": "gelu"}),  # no kink to be pushed over
    "prefix": ("prefix", {"length": 3}),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXACT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # two equal computations in this dtype


def base(name: str = "llama", dtype: torch.dtype = torch.bfloat16, threshold: float = eightbit.THRESHOLD) -> Any:
    return eightbit.held(tiny.build(name, dtype), threshold)


def adapted(name: str = "llama", dtype: torch.dtype = torch.bfloat16, method: str = "lora") -> Any:
    model = base(name, dtype)
    attach(model, method)
    return model


def attach(model: nn.Module, method: str) -> None:
    torch.manual_seed(3)
    adapters.attach(model, METHODS[method][0], name="a", **METHODS[method][1])
    shake(model, "a")


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_law(method: str, law: Callable[[Case, Path], None], tmp_path: Path) -> None:
    noise = 1.0 if method == "ia3" else 0.08
    build = partial(tiny.build, "llama", torch.bfloat16)
    case = Case(build, tiny.inputs("llama"), *METHODS[method], torch.bfloat16, noise=noise, int8=True)
    law(case, tmp_path / "adapter")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_its_codes_times_its_scales_before_and_after_a_forward(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    dense = nn.Linear(96, 40, dtype=dtype)
    with torch.no_grad():
        dense.weight[3] = 0.0
        dense.weight[5] *= 50.0
    weight = dense.weight.detach().double()
    model = eightbit.held(nn.Sequential(dense))
    layer = model[0]
    assert (is_coded(layer.weight), format_of(layer.weight), bits_of(layer.weight)) == (True, "int8", 8)
    step = weight.abs().amax(1, keepdim=True) / 127
    before = decoded(layer, layer.weight)
    assert (before.shape, before.dtype) == ((40, 96), torch.float32)
    assert ((before.double() - weight).abs() <= 0.51 * step + weight.abs() / 2**10).all()  # by way of fp16
    torch.testing.assert_close(before.double(), eightbit.by_hand(layer), rtol=1e-6, atol=0)
    early, x = copy.deepcopy(model), torch.randn(5, 96).to(dtype)
    for training in (True, False):
        model.train(training)(x)
        assert layer.weight.SCB is None
        for each in (layer, copy.deepcopy(layer), early[0]):
            assert torch.equal(decoded(each, each.weight), before)
    with unrounded(model):
        y = model(x)
    expected = x.double() @ eightbit.by_hand(layer).to(dtype).double().T + dense.bias.detach().double()
    torch.testing.assert_close(y.double(), expected, rtol=EXACT[dtype], atol=EXACT[dtype])
    assert "forward" not in vars(layer)


def test_codes_without_their_scales_are_no_weight() -> None:
    layer = base().model.layers[0].mlp.up_proj
    layer.weight.SCB = None
    with pytest.raises(adapters.AdapterError, match="without their scales"):
        codes_and_scales(layer)


@pytest.mark.parametrize("name", ["llama", "bert", "qwen3_moe", "gpt2"])
def test_sites_are_those_of_the_dense_model_and_looking_changes_nothing(name: str) -> None:
    eight, dense = base(name), tiny.build(name, torch.bfloat16)
    found, expected = adapters.sites(eight), adapters.sites(dense)
    for each in eightbit.layers(eight).values():
        assert each.state.CB is None
        assert each.weight.SCB is not None
    assert found.coverage == expected.coverage > 0.5
    assert (found.streams, found.keyvalues, found.layers) == (expected.streams, expected.keyvalues, expected.layers)
    if name == "gpt2":  # a Conv1D's weight is turned when it is quantised
        paths = [site.path for site in found.weights]
        assert paths == [site.path for site in expected.weights]
        assert not any(site.transposed for site in found.weights if site.access == "call")
    else:
        assert found == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_it_trains_as_the_dense_weights_do(method: str, dtype: torch.dtype, training: bool) -> None:
    """Outputs, gradients of the adapter and of the embeddings; in eval bitsandbytes rounds activations to 8 bits."""
    model = base(dtype=dtype).train(training)
    twin, batch = eightbit.dense_twin(model), tiny.inputs("llama")
    rounding = relative(output(model, batch), output(twin, batch))
    assert training or 1e-3 < rounding < 5e-2
    limit = EXACT[dtype] if training else 4 * rounding + EXACT[dtype]
    found = []
    for each in (model, twin):
        attach(each, method)
        for key, tensor in tensors_of(model, "a").items():  # a prefix starts from what the base makes of a token
            tensors_of(each, "a")[key].data.copy_(tensor)
        x = each.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        logits = each(inputs_embeds=x, attention_mask=batch.get("attention_mask")).logits
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        (logits * direction).float().sum().backward()
        grads = {key: p.grad for key, p in tensors_of(each, "a").items()}
        found.append({"logits": logits.detach(), "x": x.grad, **grads})
    for key, expected in found[1].items():
        assert expected.norm() > 0
        assert relative(found[0][key], expected) < limit, key


@pytest.mark.parametrize("after", [False, True], ids=["before a forward", "after one"])
def test_detaching_gives_back_codes_and_scales_where_they_were(after: bool) -> None:
    model, batch = base(), tiny.inputs("llama")
    model.requires_grad_(False)
    if after:
        output(model, batch)
    before = snapshot(model)
    places = {path: (each.weight.SCB, each.state.SCB, each.state.CB) for path, each in eightbit.layers(model).items()}
    adapters.attach(model, "lora", name="a")
    adapters.attach(model, "dora", name="b")
    adapters.detach(model)
    assert_same(snapshot(model), before)
    for path, each in eightbit.layers(model).items():
        assert [id(t) for t in (each.weight.SCB, each.state.SCB, each.state.CB)] == [id(t) for t in places[path]]
    assert torch.equal(output(model, batch), output(base(), batch))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_goes_from_the_base_in_8_bits_to_the_dense_one_and_back(name: str, tmp_path: Path) -> None:
    batch, dense, eight = tiny.inputs(name), tiny.build(name, torch.bfloat16), base(name)
    rounding = relative(output(eight, batch), output(dense, batch))
    for source, target in ((eight, dense), (dense, eight), (eight, base(name))):
        adapters.attach(source, "lora", name="a", rank=4)
        shake(source, "a")
        expected = output(source, batch)
        adapters.save(source, "a", tmp_path / "a")
        adapters.detach(source)
        report = adapters.load(target, tmp_path / "a", name="b")
        assert "the base is the one recorded" in str(report)
        assert "could not" not in str(report)
        assert relative(output(target, batch), expected) < 4 * rounding
        adapters.detach(target)


def test_beside_4_bits_the_report_says_what_could_not_be_checked(tmp_path: Path) -> None:
    adapters.save(adapted(), "a", tmp_path / "a")
    four = tiny.build("llama", torch.bfloat16)
    adapters.quantize(four)
    report = adapters.load(four, tmp_path / "a")
    assert "14 of them in int8 and nf4 alone, where a change of 1 % could not be checked" in str(report)
    other = tiny.build("llama", torch.bfloat16)
    with torch.no_grad():
        for layer in other.model.layers:
            weight = layer.mlp.up_proj.weight
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    adapters.quantize(other)
    with pytest.raises(WrongBase, match=r"2 of 21 differ, model\.layers\.\d\.mlp\.up_proj"):
        adapters.load(other, tmp_path / "a")


PATHS: dict[str, tuple[torch.dtype | str, ...]] = {
    "fp32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "fp16": (torch.float16,),
    "int8": ("int8",),
    "int8 from bf16": (torch.bfloat16, "int8"),
    "int8 from fp16": (torch.float16, "int8"),
}


def stored(model: nn.Module, form: str) -> nn.Module:
    for step in PATHS[form]:
        if isinstance(step, torch.dtype):
            model.to(step)
        else:
            eightbit.held(model)
    return model


def record(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(fingerprint(model)))
    return found


def noise(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(0.01 * parameter.std() * torch.randn_like(parameter))


def own_percent(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1 + 0.01 * torch.randn_like(parameter))


def one_factor(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.01)


def one_weight(model: nn.Module) -> None:
    inner = [p for path, p in model.named_parameters() if p.dim() == 2 and (".layers.1." in path or ".h.1." in path)]
    inner[-1].add_(0.01 * inner[-1].std() * torch.randn_like(inner[-1]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qwen3_moe"])
def test_the_base_is_recognised_in_every_format(name: str) -> None:
    records = {form: record(stored(tiny.build(name), form)) for form in PATHS}
    for live in PATHS:
        model = stored(tiny.build(name), live)
        for form in PATHS:
            assert "the base is the one recorded" in check(records[form], model), (form, live)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("change", [noise, own_percent, one_factor, one_weight])
def test_a_change_of_one_percent_is_seen_in_every_format(name: str, change: Callable[[nn.Module], None]) -> None:
    records = {form: record(stored(tiny.build(name), form)) for form in PATHS}
    for seed, live in enumerate(PATHS):
        model = tiny.build(name)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            change(model)
        stored(model, live)
        for form in PATHS:
            with pytest.raises(WrongBase, match="differ"):
                check(records[form], model)


@pytest.mark.parametrize("shape", [(40, 96), (3, 16), (16, 4), (128, 64), (1, 640)])
def test_a_record_holds_the_scale_of_every_sampled_row(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    model = eightbit.held(nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)))
    found = record(model)
    assert "1 weights agree" in check(found, model)
    entry = found["parameters"]["0.weight"]
    assert entry["dtype"] == "int8"
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[0].weight.SCB.mul_(1.01)
    with pytest.raises(WrongBase, match=r"its scale, by 1\.0%"):
        check(found, moved)
    for broken in ("AAAA", "!"):
        entry["absmax"] = broken
        with pytest.raises(DamagedAdapter, match="record"):
            check(found, model)


def test_a_base_that_was_compared_is_compared_again_when_codes_or_scales_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, real = 0, verdicts.check

    def counted(*args: Any, **kwargs: Any) -> str:
        nonlocal count
        count += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(verdicts, "check", counted)
    adapters.save(adapted(), "a", tmp_path / "a")
    model, batch = base(), tiny.inputs("llama")
    for number in range(3):
        adapters.load(model, tmp_path / "a", name=f"{number}")
        output(model, batch)
    first = count
    adapters.load(model, tmp_path / "a", name="more")
    assert count == first <= 2
    layer = model.model.layers[1].mlp.down_proj
    layer.state.SCB.mul_(1.5)
    with pytest.raises(WrongBase, match="its scale"):
        adapters.load(model, tmp_path / "a", name="scaled")
    layer.state.SCB.div_(1.5)
    layer.state.CB.neg_()
    with pytest.raises(WrongBase, match="down_proj"):
        adapters.load(model, tmp_path / "a", name="turned")


@pytest.mark.parametrize("after", [False, True], ids=["before a forward", "after one"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "method"), [("llama", "lora"), ("gpt2", "dora"), ("bert", "ia3")])
def test_a_merge_is_what_its_certificate_says(name: str, method: str, dtype: torch.dtype, after: bool) -> None:
    """Unequal operands, biases (gpt2, bert): the weights by hand, the error measured here as well."""
    model, twin, batch = adapted(name, dtype, method), eightbit.dense_twin(base(name, dtype)), tiny.inputs(name)
    attach(twin, method)
    weights = {path: eightbit.by_hand(each) for path, each in eightbit.layers(model).items()}
    biases = {path: each.bias for path, each in eightbit.layers(model).items() if each.bias is not None}
    assert bool(biases) == (name != "llama")
    if after:
        output(model, batch)
    expected, with_adapter = output(model, batch), output(twin, batch)
    deltas = {
        path: tensors_of(model, "a")[f"{path}.weight:b"].double() @ tensors_of(model, "a")[f"{path}.weight:a"].double()
        for path in (weights if method == "lora" else ())
    }
    certificate = adapters.merge(model, "a", example=batch)
    assert certificate.path == f"dequantised from int8 to {str(dtype).removeprefix('torch.')}, then merged"
    assert certificate.tolerance == 0.2
    merged = output(model, batch)
    assert certificate.error == pytest.approx(relative(merged, expected), rel=0.02)
    assert relative(merged, with_adapter) < EXACT[dtype]
    assert "no longer rounds activations to 8 bits" in str(certificate)
    assert not any(is_coded(p) for p in model.parameters())
    for path, w in weights.items():
        layer = model.get_submodule(path)
        assert type(layer).__name__ == ("Conv1D" if name == "gpt2" else "Linear")
        assert layer.weight.dtype == dtype
        if path in deltas:
            assert relative(layer.weight, w + 6.0 / 4 * deltas[path]) < torch.finfo(dtype).eps
        if path in biases and method != "ia3":  # which scales what a layer returns, its bias as well
            assert torch.equal(layer.bias, biases[path])


def test_a_merge_that_is_refused_leaves_the_codes_where_they_were() -> None:
    model, batch = adapted(), tiny.inputs("llama")
    expected = output(model, batch)
    before = snapshot(model)
    with pytest.raises(adapters.AdapterError, match="more than the tolerance of 1e-12"):
        adapters.merge(model, "a", example=batch, tolerance=1e-12)
    assert_same(snapshot(model), before)
    assert torch.equal(output(model, batch), expected)
    with pytest.raises(adapters.AdapterError, match="requantize is 'nf4', but this base is held in int8"):
        adapters.merge(model, "a", example=batch, requantize="nf4")


def test_a_merge_that_lost_its_adapter_does_not_hide_in_the_rounding_of_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from adapters._merge import fold

    model, batch = base(dtype=torch.float32), tiny.inputs("llama")
    adapters.attach(model, "lora", name="a", rank=4)
    shake(model, "a", noise=0.004)
    with adapters.using(model, None):
        without = output(model, batch)
    assert relative(output(model, batch), without) < 0.2
    real = fold.merged_parameters

    def lost(*args: Any) -> Any:
        found = real(*args)
        layers = eightbit.layers(model)
        found.new = {path: eightbit.by_hand(layers[path.removesuffix(".weight")]).float() for path in found.new}
        return found

    with monkeypatch.context() as patch:
        patch.setattr(fold, "merged_parameters", lost)
        with pytest.raises(adapters.AdapterError, match=r"changes the outputs by .* more than the tolerance of 1e-04"):
            adapters.merge(model, "a", example=batch)
    assert adapters.merge(model, "a", example=batch).error < 0.2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_transformers_quantised_is_a_plain_one_once_merged(name: str, bits: int, tmp_path: Path) -> None:
    import transformers as hf

    tiny.build(name, torch.bfloat16).save_pretrained(tmp_path / "base")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = hf.BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    loaded: Any = partial(hf.AutoModelForCausalLM.from_pretrained, tmp_path / "base", dtype=torch.bfloat16)
    model, batch = loaded(quantization_config=config), tiny.inputs(name)
    if bits == 8:
        assert list(eightbit.layers(model)) == list(eightbit.layers(base(name)))
    adapters.attach(model, "lora", name="a", rank=4)
    shake(model, "a")
    adapters.save(model, "a", tmp_path / "a")
    assert "the base is the one recorded" in str(adapters.load(loaded(), tmp_path / "a"))
    adapters.merge(model, "a", example=batch)
    model.save_pretrained(tmp_path / "merged")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(is_coded(p) for p in again.parameters())
    assert torch.equal(output(again, batch), output(model, batch))
    assert [type(module) for module in again.modules()] == [type(module) for module in loaded().modules()]


def test_folders_of_stock_peft_act_as_there(tmp_path: Path) -> None:
    """Its layers call the same products, so the outputs are equal to the last bit; saved and adopted alive."""
    peft = pytest.importorskip("peft")
    model, batch = base(), tiny.inputs("llama")
    model.is_loaded_in_8bit = True
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(model, config).eval()
    shake_trained(theirs)
    expected = output(theirs, batch)
    theirs.save_pretrained(str(tmp_path))
    ours = base()
    adapters.load(ours, tmp_path)
    assert torch.equal(output(ours, batch), expected)
    assert torch.equal(output(adapters.adopt(theirs), batch), expected)


def test_what_needs_other_bits_is_refused_by_name(tmp_path: Path) -> None:
    model = base()
    before = snapshot(model)
    refusals: dict[str, Callable[[], Any]] = {
        r"qlora is the preset for a base in nf4, and model\.layers\.0.* is held in int8: attach 'lora'": lambda: (
            adapters.attach(model, "qlora")
        ),
        r"model\.layers\.0.* is held in int8, and 4 bits are made of 16": lambda: adapters.quantize(model),
        r"Known: nf4\. For 8 bits load the base with transformers'": lambda: adapters.quantize(model, "int8"),
        "a base in 8 bits cannot be planned": lambda: adapters.plan(model, "lora"),
        "weights in 8 bits cannot be told from their fine-tuned ones": lambda: adapters.extract(
            model, tiny.build("llama", torch.bfloat16), "tuned"
        ),
    }
    for sentence, act in refusals.items():
        with pytest.raises(adapters.AdapterError, match=sentence):
            act()
    assert_same(snapshot(model), before)
    adapters.attach(model, "lora", name="a")
    shake(model, "a")
    with pytest.raises(adapters.AdapterError, match=r"held in int8, and a merge by files reads dense weights"):
        adapters.merge_files(model, "a", tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_rows_of_tables_in_8_bits_are_refused() -> None:
    model = base()
    head = model.lm_head
    model.lm_head = eightbit.held(nn.Sequential(copy.deepcopy(head)))[0]
    with pytest.raises(adapters.AdapterError, match=r"lm_head\.weight is in 8 bits, and single rows"):
        adapters.attach(model, "lora", tokens=[5, 6])


class QuantLinear(nn.Module):
    """What GPTQ's and AWQ's layers hold: eight codes in an element of int32, scales beside them."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = old.in_features, old.out_features
        self.register_buffer("qweight", torch.zeros(old.in_features // 8, old.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(old.in_features // 32, old.out_features, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True).expand(*x.shape[:-1], self.out_features) * self.scales[0].to(x.dtype)


class ByteLinear(QuantLinear):
    """What HQQ's hold: a parameter of bytes."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__(old)
        del self.qweight
        codes = torch.zeros(old.out_features, old.in_features, dtype=torch.uint8)
        self.W_q = nn.Parameter(codes, requires_grad=False)


def in_16_bits(old: nn.Linear) -> nn.Module:
    new: nn.Module = bnb.nn.Linear8bitLt(old.in_features, old.out_features, False, True, 6.0)
    return new.requires_grad_(False)


@pytest.mark.parametrize(
    ("layer", "held"),
    [
        (QuantLinear, r"holds its weight in torch\.int32 \(QuantLinear\)"),
        (ByteLinear, r"holds its weight in torch\.uint8 \(ByteLinear\)"),
        (in_16_bits, r"makes 8-bit codes of its weight as it goes \(Linear8bitLt with llm_int8_has_fp16_weight\)"),
    ],
)
def test_weights_that_cannot_be_read_are_named(layer: Callable[[nn.Linear], nn.Module], held: str) -> None:
    model = tiny.build("llama")
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            model.set_submodule(path, layer(module))
    sentence = rf"model\.layers\.0\.self_attn\.q_proj {held}, which this library cannot read: load the base in 16 bits"
    for targets in (None, "q_proj", "attention.query", "all"):
        with pytest.raises(adapters.AdapterError, match=sentence):
            adapters.attach(model, "lora", targets=targets)
    left = [each for each in adapters.sites(model).unreached if "cannot read" in each.reason]
    assert len(left) == 14
    assert sum(each.size for each in left) == 73_728
    assert not [each for each in adapters.sites(model).unreached if each not in left]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_no_dense_layer_is_taken_for_one_that_cannot_be_read(name: str) -> None:
    assert not unreadable(dict(tiny.build(name).named_modules()))


def test_peft_is_told_of_8_bits() -> None:
    pytest.importorskip("peft")
    from adapters._bridge.status import whole

    status = whole(adapted())
    assert status.quantization_backend == "bnb 8bit"
    assert status.total_params == sum(p.numel() for p in adapted().parameters())
