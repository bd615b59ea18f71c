"""One batch whose rows use different adapters: in forwards over every layout of rows, in generation, in training, and
compiled. Always against the separate runs of each adapter.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import frozen, main, output, relative, shake
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import adapters
from adapters import AdapterError
from adapters._attach import tensors_of
from tests.matrix.build import build
from tests.matrix.pairs import pairs

CLOSE = 1e-5
NAMES = ("a", "b", "c")
# three adapters on one model, by what they are; of unlike sizes
SETS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "lora": {"a": ("lora", {"rank": 4, "alpha": 6.0}), "b": ("lora", {"rank": 9}), "c": ("lora", {"rank": 4})},
    "dora": {"a": ("dora", {"rank": 4}), "b": ("dora", {"rank": 2, "alpha": 30.0}), "c": ("lora", {"rank": 3})},
    "ia3": {"a": ("ia3", {}), "b": ("ia3", {}), "c": ("ia3", {})},
    "loha": {"a": ("loha", {"alpha": 80.0}), "b": ("loha", {"alpha": 80.0}), "c": ("loha", {"rank": 2, "alpha": 60.0})},
    "bottleneck": {
        "a": ("bottleneck", {"reduction_factor": 8.0, "activation": "gelu"}),
        "b": ("bottleneck", {"reduction_factor": 5.0, "placement": "houlsby", "activation": "tanh"}),
        "c": ("bottleneck", {"reduction_factor": 8.0, "activation": "gelu"}),
    },
    "prefix": {"a": ("prefix", {"length": 3}), "b": ("prefix", {"length": 7}), "c": ("prefix", {"length": 3})},
    "all": {"a": ("lora", {"rank": 4}), "b": ("bottleneck", {"activation": "gelu"}), "c": ("prefix", {"length": 4})},
}
TINY = ("llama", "gpt2")
GENERATES = [*TINY, "t5", "mamba", "jamba"]


def base(name: str) -> Any:
    """A tiny model; those that `tiny` does not have come from the matrix."""
    if name in tiny.NAMES:
        return tiny.build(name)
    head = "seq2seq" if name == "t5" else "causal"
    return build(next(pair for pair in pairs() if (pair.type, pair.head) == (name, head)))[0]


def attached(name: str, kind: str, made: Any = None, noise: float = 0.08) -> Any:
    model = base(name) if made is None else made
    for seed, (adapter, (method, options)) in enumerate(SETS[kind].items(), 61):
        torch.manual_seed(seed)
        adapters.attach(model, method, name=adapter, head=False, **options)
        shake(model, adapter, seed, 0.3 if method == "ia3" else noise)
    adapters.activate(model, None)
    return model


@functools.cache
def shared(name: str, kind: str) -> Any:
    """The same for tests that do not change it; the matrix's models need louder adapters to write other texts."""
    return attached(name, kind, noise=0.08 if name in tiny.NAMES else 2.0 if kind == "prefix" else 0.5)


def found(model: Any, selection: Any, batch: dict[str, Any]) -> Tensor:
    with adapters.using(model, selection):
        return output(model, batch)


def check_rows(model: Any, chosen: list[Any], batch: dict[str, Any], close: float = CLOSE) -> None:
    mixed = found(model, chosen, batch)
    alone = {name: found(model, name, batch) for name in dict.fromkeys(chosen)}
    assert mixed.shape == alone[chosen[0]].shape
    for row, name in enumerate(chosen):
        assert relative(mixed[row], alone[name][row]) < close, (row, name)


# -- forwards


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_each_row_is_its_separate_run(name: str, kind: str) -> None:
    model = shared(name, kind)
    for padded in (False, True):
        batch = tiny.inputs(name, rows=6, padded=padded)
        check_rows(model, ["a", "b", None, "c", "a", "b"], batch)
        check_rows(model, ["c", "c", "c", "a", "c", "c"], batch)
    check_rows(model, ["b"], tiny.inputs(name, rows=1))
    check_rows(model, [None, "b"], tiny.inputs(name, rows=2, tokens=1))


def test_many_adapters_of_few_rows_and_few_of_many() -> None:
    """Where rows are grouped, and where they are gathered: any number of adapters among any number of rows."""
    model = tiny.build("llama")
    names: list[Any] = [f"n{i}" for i in range(12)]
    for seed, name in enumerate(names, 80):
        adapters.attach(model, "lora", name=name, rank=(2, 4, 4, 8)[seed % 4])
        shake(model, name, seed)
    generator = torch.Generator().manual_seed(0)
    for count, rows in ((1, 12), (2, 12), (4, 12), (5, 12), (12, 12), (12, 24), (3, 3)):
        order = torch.randint(0, count, (rows,), generator=generator).tolist()
        chosen = [names[i] if i % 5 != 3 else None for i in order]
        check_rows(model, chosen, tiny.inputs("llama", rows=rows, tokens=5))


def test_prefixes_of_any_lengths_and_none() -> None:
    """Columns that a shorter prefix does not fill are seen by nobody, with and without a mask, in every attention."""
    model = tiny.build("llama")
    for seed, (name, length) in enumerate((("a", 1), ("b", 9), ("c", 4), ("d", 9)), 70):
        adapters.attach(model, "prefix", name=name, length=length)
        shake(model, name, seed)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        for padded in (False, True):
            batch = tiny.inputs("llama", rows=5, padded=padded)
            check_rows(model, ["a", "b", None, "c", "d"], batch)
            check_rows(model, ["a", None, None, None, "a"], batch)
            check_rows(model, ["b", "d", "b", "d", "b"], batch)
            check_rows(model, [adapters.Stack("a", "b"), None, "c", adapters.Stack("c", "a"), "d"], batch)
        without = {"input_ids": tiny.inputs("llama", rows=3)["input_ids"]}
        check_rows(model, ["a", "b", None], without)
    # shifted positions are a matter of each row, too
    for seed, (name, length) in enumerate((("e", 3), ("f", 6)), 90):
        adapters.attach(model, "prefix", name=name, length=length, positions="shifted")
        shake(model, name, seed)
    for padded in (False, True):
        check_rows(model, ["e", "a", None, "f", "b"], tiny.inputs("llama", rows=5, padded=padded))


LAYOUTS = {  # a model type of each layout in which rows reach weights or streams
    "windowed": ("swin", "image"),
    "windowed, none": ("swinv2", "image"),
    "routed": ("mixtral", "causal"),
    "routed, shared expert": ("qwen2_moe", "causal"),
    "experts in a batch": ("llama4_text", "causal"),
    "experts read one by one": ("dbrx", "causal"),
    "axis 1": ("xlnet", "causal"),
    "axis 1, streams too": ("fsmt", "seq2seq"),
    "axis 1 and 0": ("longformer", "masked"),
    "flattened": ("openai-gpt", "causal"),
    "flattened streams": ("opt", "causal"),
    "windowed by choices": ("bert", "choice"),
    "flattened choices": ("squeezebert", "choice"),
    "pictures": ("mobilevit", "image"),
    "channels": ("poolformer", "image"),
    "no rows": ("perceiver", "image"),
    "kernels": ("efficientnet", "image"),
    "shared layers": ("albert", "encoder"),
    "two towers": ("t5", "seq2seq"),
    "state space": ("mamba2", "causal"),
    "hybrid": ("zamba", "causal"),
}


@functools.cache
def laid_out(layout: str) -> tuple[Any, dict[str, Any]]:
    return build(next(pair for pair in pairs() if (pair.type, pair.head) == LAYOUTS[layout]))


def show(model: Any, name: str, seed: int, batch: dict[str, Any]) -> None:
    """Shakes an adapter as much as it takes to change the output well, and not beyond all recognition."""
    base, fresh = found(model, None, batch), {key: t.detach().clone() for key, t in tensors_of(model, name).items()}

    def effect(noise: float) -> float:
        with torch.no_grad():
            for key, tensor in tensors_of(model, name).items():
                tensor.copy_(fresh[key])
        shake(model, name, seed, noise)
        return relative(found(model, name, batch), base)

    noises = (0.08, 0.3, 0.02, 1.0, 0.005)
    best = next((noise for noise in noises if 5e-3 < effect(noise) < 1), None)
    best = min(noises, key=lambda noise: abs(math.log(effect(noise)))) if best is None else best
    assert 3e-4 < effect(best) < 3


@pytest.mark.parametrize("kind", ["lora", "ia3", "bottleneck", "prefix"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_followed_in_every_layout(layout: str, kind: str) -> None:
    import copy

    made, batch = laid_out(layout)
    two = {key: x for key, x in batch.items() if torch.is_tensor(x)}
    order = torch.tensor([0, 1, 0, 1, 1])
    five = {**batch, **{key: x[order] for key, x in two.items()}}
    try:
        model = attached("", kind, copy.deepcopy(made), noise=0.0)
    except AdapterError as error:
        pytest.skip(f"the method has no place there: {error}")
    for seed, name in enumerate(NAMES, 61):
        show(model, name, seed, batch)
    check_rows(model, ["a", None, "b", "c", "a"], five)
    with adapters.using(model, ["a", None, "b", "c", "a"]) as report:
        assert report.runs


class Laid(nn.Module):
    """A layer that sees its rows in every layout in turn, and a residual stream around the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.axis, self.moved, self.flat, self.between, self.windows, self.pooled = (nn.Linear(6, 6) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, n = x.shape
        x = x + self.axis(x)
        x = x + self.moved(x.transpose(0, 1)).transpose(0, 1).tanh()
        x = x + self.flat(x.reshape(-1, n)).view(rows, tokens, n).tanh()
        x = x + self.between(x.transpose(0, 1).reshape(-1, n)).view(tokens, rows, n).transpose(0, 1).tanh()
        x = x + self.windows(x.reshape(rows * 2, tokens // 2, n)).view(rows, tokens, n).tanh()
        return x + self.pooled(x.mean(1))[:, None]


@pytest.mark.parametrize("method", ["lora", "dora", "loha"])
def test_every_layout_by_itself(method: str) -> None:
    model = Laid()
    example = {"x": torch.randn(3, 8, 6)}
    for seed, name in enumerate(NAMES, 61):
        adapters.attach(model, method, name=name, rank=2, targets="all", example=example)
        shake(model, name, seed, 0.3)
    rows = {site.owner: str(site.rows) for site in adapters.sites(model, example).weights}
    assert rows == {
        "axis": "axis 0",
        "moved": "axis 1",
        "flat": "flattened 0",
        "between": "interleaved 0",
        "windows": "windowed 0",
        "pooled": "axis 0",
    }
    plain = frozen(Laid())
    for count, tokens in ((5, 8), (4, 4), (8, 8), (6, 2), (2, 6)):
        x = torch.randn(count, tokens, 6, generator=torch.Generator().manual_seed(count))
        chosen = list(itertools.islice(itertools.cycle(["a", None, "b", "c", "a"]), count))
        with torch.no_grad():
            with adapters.using(model, chosen) as report:
                mixed = model(x)
            assert report.runs == 1
            for row, name in enumerate(chosen):
                with adapters.using(model, name):
                    assert relative(mixed[row], model(x)[row]) < CLOSE, (row, name)
                if name is None:
                    assert relative(mixed[row], plain(x)[row]) < CLOSE


def test_the_models_have_the_layouts_that_they_stand_for() -> None:
    named = ("windowed", "routed", "axis 1", "flattened", "no rows")
    seen = {site.rows.layout for layout in named for site in adapters.sites(laid_out(layout)[0]).weights}
    assert seen == {"axis", "windowed", "routed", "flattened", "none"}


def test_a_pooled_layer_has_one_row_each() -> None:
    model = tiny.build("bert_classifier")
    for seed, (name, targets) in enumerate((("a", "*pooler.dense"), ("b", "all"), ("c", "*pooler.dense")), 70):
        adapters.attach(model, "lora", name=name, rank=4, targets=targets, head=False)
        shake(model, name, seed, 0.3)
    check_rows(model, ["a", "b", None, "c", "a"], tiny.inputs("bert_classifier", rows=5))
    # as many rows as tokens, and as features: nothing is guessed from sizes
    for rows, tokens in ((7, 7), (5, 5), (64, 3), (4, 64)):
        chosen = list(itertools.islice(itertools.cycle(["a", "b", None, "c", "b"]), rows))
        check_rows(model, chosen, tiny.inputs("bert_classifier", rows=rows, tokens=tokens))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "bert"])
def test_numbers_of_rows_tokens_and_features_that_coincide(name: str) -> None:
    model = shared(name, "lora")
    for rows, tokens in ((7, 7), (2, 4), (4, 2), (64, 2), (3, 64), (1, 3)):
        chosen = list(itertools.islice(itertools.cycle(["a", "b", None, "c", "b"]), rows))
        check_rows(model, chosen, tiny.inputs(name, rows=rows, tokens=tokens))


def test_heads_follow_their_rows_or_the_selection_is_refused() -> None:
    """Adapters with heads of their own sizes cannot answer in one tensor; of one size they can."""
    model = tiny.build("bert_classifier")
    for seed, name in enumerate("ab", 70):
        adapters.attach(model, "lora", name=name, rank=4)
        shake(model, name, seed)
    batch = tiny.inputs("bert_classifier", rows=3)
    try:
        mixed = found(model, ["a", None, "b"], batch)
    except AdapterError as error:
        assert "head" in str(error)  # noqa: PT017
        return
    for row, name in enumerate(("a", None, "b")):
        assert relative(mixed[row], found(model, name, batch)[row]) < CLOSE


def test_other_outputs_are_mixed_as_well() -> None:
    """Hidden states, a cache, a loss over all rows; outputs as a tuple."""
    model, batch = shared("llama", "all"), tiny.inputs("llama", rows=3)
    chosen = ["a", None, "c"]
    labels = {"labels": batch["input_ids"]}
    with torch.no_grad():
        with adapters.using(model, chosen):
            mixed = model(**batch, **labels, output_hidden_states=True, use_cache=True)
            pair = model(**batch, return_dict=False)
        for row, name in enumerate(chosen):
            with adapters.using(model, name):
                alone = model(**batch, output_hidden_states=True, use_cache=True)
            for here, there in zip(mixed.hidden_states, alone.hidden_states, strict=True):
                assert relative(here[row], there[row]) < CLOSE
            layers = zip(mixed.past_key_values.layers, alone.past_key_values.layers, strict=True)
            assert all(relative(here.keys[row], there.keys[row]) < CLOSE for here, there in layers)
            assert relative(pair[0][row], alone.logits[row]) < CLOSE
        logits, ids = mixed.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
    assert relative(mixed.loss, cross_entropy(logits, ids)) < CLOSE


def test_embeddings_and_positions_given_by_the_caller() -> None:
    model, batch = shared("llama", "all"), tiny.inputs("llama", rows=3)
    states = model.get_input_embeddings()(batch["input_ids"])
    given = {"inputs_embeds": states, "attention_mask": batch["attention_mask"]}
    check_rows(model, ["a", "b", "c"], given)
    expected = found(model, ["a", "b", "c"], batch)
    assert relative(found(model, ["a", "b", "c"], given), expected) < CLOSE
    with adapters.using(model, ["a", "b", "c"]), torch.no_grad():
        assert relative(model(batch["input_ids"], batch["attention_mask"]).logits, expected) < CLOSE
    positions = {**batch, "position_ids": torch.arange(7)[None]}  # one row for all
    check_rows(model, ["a", "b", "c"], positions)
    check_rows(model, ["a", "b", "c"], {**batch, "position_ids": torch.arange(7).expand(3, -1)})


def test_each_thread_has_rows_of_its_own() -> None:
    import threading

    model = shared("llama", "all")
    orders = [["a", None, "b"], ["b", "c", "a"], ["c", "c", None], [None, "a", "a"]]
    batch = tiny.inputs("llama", rows=3)
    wanted = [found(model, order, batch) for order in orders]
    wrong: list[Any] = []

    def run(which: int) -> None:
        try:
            for _ in range(10):
                if not torch.equal(found(model, orders[which], batch), wanted[which]):
                    wrong.append(which)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(which,)) for which in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- generation


def prompts(model: Any, rows: int = 4, left: bool = True) -> dict[str, Tensor]:
    """Prompts of unequal lengths, padded on the left."""
    batch = tiny.inputs(model, rows=rows, tokens=6)
    if left:
        lengths = torch.tensor([6, 3, 5, 4, 2, 6][:rows])
        mask = (torch.arange(6)[None] >= 6 - lengths[:, None]).long()
        batch = {"input_ids": torch.where(mask.bool(), batch["input_ids"], 0), "attention_mask": mask}
    return batch


def texts(tokens: Tensor, end: int, pad: int) -> list[list[int]]:
    """The rows without what follows their end."""
    found = []
    for row in tokens.tolist():
        while row and row[-1] in (end, pad):
            row.pop()
        found.append(row)
    return found


def generated(model: Any, selection: Any, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
    torch.manual_seed(5)
    with adapters.using(model, selection), torch.no_grad():
        tokens = model.generate(**batch, **{"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, **options})
    return texts(tokens, 2, 0)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "several of each": {"num_beams": 4, "num_return_sequences": 2},
    "a static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["lora", "bottleneck", "prefix", "all"])
@pytest.mark.parametrize("name", GENERATES)
def test_a_mixed_generation_is_the_separate_ones(name: str, kind: str, way: str) -> None:
    if way == "a static cache" and name not in TINY:
        pytest.skip("a static cache is for decoders with attention alone")
    model = shared(name, kind)
    batch = prompts(model, left=name != "mamba")
    chosen: list[Any] = ["a", None, "b", "c"]
    mixed = generated(model, chosen, batch, **WAYS[way])
    each = len(mixed) // len(chosen)
    assert each == WAYS[way].get("num_return_sequences", 1)
    alone = [generated(model, adapter, batch, **WAYS[way]) for adapter in chosen]
    for row in range(len(chosen)):
        assert mixed[each * row : each * row + each] == alone[row][each * row : each * row + each], row
    if (name, kind) != ("mamba", "prefix"):  # whose states forget where they began
        assert len({str(each) for each in alone}) > 1, "the adapters write the same here"


def test_sampling_draws_for_each_row_what_it_draws_alone() -> None:
    """torch draws the noise of a batch at once, so that equal seeds mean equal noise for a row."""
    model = shared("llama", "all")
    batch, chosen = prompts(model), ["a", None, "b", "c"]
    options = {"do_sample": True, "min_new_tokens": 7, "top_k": 0}
    mixed = generated(model, chosen, batch, **options)
    for row, name in enumerate(chosen):
        assert mixed[row] == generated(model, name, batch, **options)[row]
    several = generated(model, chosen, batch, **options, num_return_sequences=3)
    for row, name in enumerate(chosen):
        alone = generated(model, name, batch, **options, num_return_sequences=3)
        assert several[3 * row : 3 * row + 3] == alone[3 * row : 3 * row + 3]


def test_nested_selections_generate_by_row() -> None:
    model, batch = shared("llama", "all"), prompts(shared("llama", "all"))
    average = adapters.Average("a", "b", weights=(0.3, 0.9))
    chosen = [adapters.Stack("a", "b", "c"), average, None, adapters.Stack(average, "c")]
    for options in WAYS.values():
        mixed = generated(model, chosen, batch, **options)
        each = len(mixed) // len(chosen)
        for row, selection in enumerate(chosen):
            alone = generated(model, selection, batch, **options)
            assert mixed[each * row : each * row + each] == alone[each * row : each * row + each]


def test_generation_expands_rows_and_a_forward_does_not() -> None:
    model, batch = shared("llama", "lora"), prompts(shared("llama", "lora"))
    with adapters.using(model, ["a", "b"]):
        for options in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}):
            with pytest.raises(AdapterError, match="row"):
                model.generate(**batch, max_new_tokens=2, **options)
        with pytest.raises(AdapterError, match="row"):
            model(**batch)
    with adapters.using(model, ["a", "b"]):  # and nothing stays expanded
        beams = model.generate(**prompts(model, rows=2), max_new_tokens=2, num_beams=2)
        assert len(beams) == 2
        assert output(model, tiny.inputs("llama", rows=2)).shape[0] == 2
        with pytest.raises(AdapterError, match="row"):
            model(**batch)


def test_decoding_step_by_step_with_a_cache() -> None:
    """A caller's own loop: prefill, then one token at a time."""
    for kind in ("lora", "bottleneck", "prefix", "all"):
        model, batch = shared("llama", kind), tiny.inputs("llama", rows=3, tokens=7)
        for chosen in (["a", "b", "c"], ["c", None, "a"]):
            whole = found(model, chosen, {"input_ids": batch["input_ids"]})
            with adapters.using(model, chosen), torch.no_grad():
                first = model(batch["input_ids"][:, :4], use_cache=True)
                pieces, cache = [first.logits], first.past_key_values
                for token in range(4, 7):
                    step = model(batch["input_ids"][:, token : token + 1], past_key_values=cache, use_cache=True)
                    pieces.append(step.logits)
            assert relative(torch.cat(pieces, 1), whole) < CLOSE


# -- training


def row_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = main(model(**batch))
    labels = batch["input_ids"]
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return losses.mean(1)


def grads_of(model: Any, names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    found = {}
    for name in names:
        for key, tensor in tensors_of(model, name).items():
            if tensor.grad is not None:
                found[f"{name} {key}"] = tensor.grad.clone()
    return found


CHECKPOINTING: dict[str, Callable[[Any], None]] = {
    "none": lambda model: None,
    "checkpointed": lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
    "reentrant": lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
}


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_adapters_trained_in_one_forward_learn_what_each_learns_alone(name: str, kind: str, how: str) -> None:
    if name == "qwen3_moe" and (how != "none" or kind not in ("lora", "all", "prefix")):
        pytest.skip("experts are asked once a kind of site")
    model = attached(name, kind).train()
    CHECKPOINTING[how](model)
    batch = tiny.inputs(name, rows=5)
    chosen = ["a", "b", "c", None, "a"]
    weights = torch.tensor([1.0, 0.5, 2.0, 3.0, -0.7])
    with adapters.using(model, chosen):
        losses = row_losses(model, batch)
    (losses * weights).sum().backward()  # after the selection has gone, as trainers do
    mixed = grads_of(model)
    for row, name_ in enumerate(chosen):
        with torch.no_grad(), adapters.using(model, name_):
            assert relative(losses[row], row_losses(model, batch)[row]) < CLOSE
    model.zero_grad()
    for adapter in NAMES:
        own = torch.tensor([name_ == adapter for name_ in chosen])
        with adapters.using(model, adapter):
            (row_losses(model, batch) * weights * own).sum().backward()
    alone = grads_of(model)
    reached = {key for key, grad in alone.items() if grad.norm() > 0}
    assert reached
    assert reached <= set(mixed)
    for key, grad in mixed.items():
        if key in reached:
            assert relative(grad, alone[key]) < CLOSE, key
        else:
            assert grad.norm() == 0, key
    assert {key.split(" ")[0] for key in mixed} == set(NAMES)


def test_rows_of_frozen_adapters_and_of_the_base_train_nothing() -> None:
    model = attached("llama", "lora").train()
    for tensor in tensors_of(model, "b").values():
        tensor.requires_grad_(False)
    batch = tiny.inputs("llama", rows=4)
    with adapters.using(model, ["a", "b", None, "b"]):
        row_losses(model, batch).sum().backward()
    assert all(tensor.grad is None for tensor in tensors_of(model, "b").values())
    assert all(tensor.grad is None or tensor.grad.norm() == 0 for tensor in tensors_of(model, "c").values())
    first = grads_of(model, ("a",))
    model.zero_grad()
    with adapters.using(model, "a"):
        row_losses(model, batch)[0].backward()
    assert all(relative(first[key], grad) < CLOSE for key, grad in grads_of(model, ("a",)).items())


def test_a_step_for_several_adapters_is_a_step_for_each() -> None:
    """Ten steps of Adam in mixed batches end where ten steps of each alone end."""
    together, apart = attached("llama", "all").train(), attached("llama", "all").train()
    batches = [tiny.inputs("llama", rows=3, seed=seed) for seed in range(5)]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2) for m in (together, apart)]
    for batch in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        with adapters.using(together, ["a", "b", "c"]):
            row_losses(together, batch).sum().backward()
        for row, name in enumerate(NAMES):
            with adapters.using(apart, name):
                row_losses(apart, batch)[row].backward()
        for optimizer in optimizers:
            optimizer.step()
    for name in NAMES:
        for key, tensor in tensors_of(together, name).items():
            assert relative(tensor, tensors_of(apart, name)[key]) < 1e-4, key


def test_dropout_falls_on_the_rows_of_its_adapter() -> None:
    model = tiny.build("llama")
    for seed, (name, dropout) in enumerate((("a", 0.5), ("b", 0.0)), 70):
        adapters.attach(model, "lora", name=name, rank=4, dropout=dropout)
        shake(model, name, seed)
    model.train()
    batch = tiny.inputs("llama", rows=3)
    torch.manual_seed(0)
    first, second = (found(model, ["a", "b", None], batch) for _ in range(2))
    assert relative(first[0], second[0]) > 1e-3
    assert relative(first[1], found(model, "b", batch)[1]) < CLOSE
    assert relative(first[2], found(model, None, batch)[2]) < CLOSE
    model.eval()
    check_rows(model, ["a", "b", None], batch)


# -- compiled


def shallow() -> Any:
    """A model of one layer, which compiles in half the time."""
    model = tiny.build("llama")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    return model


@pytest.fixture
def counted() -> Iterator[Any]:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "bottleneck"])
def test_compiled_code_is_one_graph(kind: str, tmp_path: Path) -> None:
    model, batch = attached("", kind, shallow()), tiny.inputs("llama", rows=4)
    adapters.save(model, "b", tmp_path)
    adapters.detach(model, "b")
    adapters.load(model, tmp_path, name="b")
    selections: list[Any] = ["a", "b", ["a", "b", None, "a"]]
    for selection in selections if kind == "lora" else selections[1:2]:
        torch._dynamo.reset()
        with adapters.using(model, selection):
            found = torch._dynamo.explain(model)(**batch)
        assert found.graph_count == 1, (selection, [str(each.reason)[:200] for each in found.break_reasons[:1]])


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_compiled_code_serves_any_rows_without_compiling_anew(kind: str, counted: Any, tmp_path: Path) -> None:
    """Adapters in the tables of a pool are chosen for each row by number; also where another model has a prefix."""
    shared("llama", "prefix")
    model, twin = shallow(), attached("", kind, shallow())
    pool = adapters.Pool(model, slots=4)
    for name in NAMES:
        adapters.save(twin, name, tmp_path / name)
        pool.add(tmp_path / name, name=name)
    batch = tiny.inputs("llama", rows=4)
    compiled = torch.compile(model, backend=counted)
    orders: list[Any] = [["a", "b", None, "c"], ["c", "a", "b", None], ["b", "b", "c", "a"], [None, "c", "a", "b"]]
    orders += [list(order) for order in itertools.islice(itertools.permutations(["a", "b", "c", None]), 5, 20)]
    with adapters.using(model, orders[0]):
        output(compiled, batch)
    once = counted.frame_count
    assert once == 1
    for order in orders:
        with adapters.using(model, order):
            mixed = output(compiled, batch)
        assert relative(mixed, found(twin, order, batch)) < CLOSE
    adapters.activate(model, orders[3])
    assert relative(output(compiled, batch), found(twin, orders[3], batch)) < CLOSE
    assert counted.frame_count == once
    for name in ("a", "b", None, "c", "a"):  # one for all rows is other code, once
        with adapters.using(model, name):
            assert relative(output(compiled, batch), found(twin, name, batch)) < CLOSE
    assert counted.frame_count <= once + 1
    stack: Any = adapters.Stack("a", "b")  # also of what no table can tell
    for selection in (stack, [stack, None, "c", "b"], adapters.Average("a", "b", weights=(0.3, 0.9))):
        with adapters.using(model, selection):
            assert relative(output(compiled, batch), found(twin, selection, batch)) < CLOSE


def test_compiled_code_follows_every_selection(counted: Any) -> None:
    model = attached("", "lora", shallow())
    batch = tiny.inputs("llama", rows=4)
    compiled = torch.compile(model, backend=counted)
    selections: list[Any] = [
        "a",
        ["a", "b", None, "c"],
        adapters.Stack("a", "b"),
        None,
        adapters.Average("a", "c", weights=(0.3, 0.9)),
        ["b", adapters.Stack("a", "b"), "c", None],
        "b",
    ]
    for selection in selections:
        with adapters.using(model, selection):
            assert relative(output(compiled, batch), output(model, batch)) < CLOSE, selection


def test_compiled_training_of_mixed_rows(counted: Any) -> None:
    model = attached("", "lora", shallow()).train()
    batch = tiny.inputs("llama", rows=3)
    compiled = torch.compile(model, backend=counted)
    with adapters.using(model, list(NAMES)):
        row_losses(compiled, batch).sum().backward()
        mixed = grads_of(model)
        model.zero_grad()
        row_losses(model, batch).sum().backward()
    assert all(relative(mixed[key], grad) < CLOSE for key, grad in grads_of(model).items())


# -- copies, precisions


def test_copies_and_other_dtypes_mix_alike() -> None:
    import copy

    model = attached("llama", "all")
    batch = tiny.inputs("llama", rows=4)
    chosen = ["a", "b", "c", None]
    expected = found(model, chosen, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(found(twin, chosen, batch), expected)
    adapters.activate(twin, chosen)
    assert torch.equal(found(model, "a", batch)[0], found(model, ["a"] * 4, batch)[0])
    assert relative(output(copy.deepcopy(twin), batch), expected) < 1e-6
    wide = copy.deepcopy(model).double()
    check_rows(wide, chosen, batch, 1e-9)
    half = copy.deepcopy(model).bfloat16()
    check_rows(half, chosen, batch, 3e-2)
    with torch.autocast("cpu", torch.bfloat16):
        check_rows(model, chosen, batch, 3e-2)


def test_a_quantised_base_mixes_rows() -> None:
    model = tiny.build("llama", torch.bfloat16)
    adapters.quantize(model, "nf4", compute_dtype=torch.bfloat16)
    attached("", "all", model)
    check_rows(model, ["a", "b", "c", None], tiny.inputs("llama", rows=4), 3e-2)
    base = frozen(tiny.build("llama", torch.bfloat16))
    adapters.quantize(base, "nf4", compute_dtype=torch.bfloat16)
    batch = tiny.inputs("llama", rows=4)
    assert relative(found(model, ["a", "b", "c", None], batch)[3], output(base, batch)[3]) < 3e-2


def test_nothing_of_a_selection_stays_in_a_model_that_is_detached() -> None:
    model: nn.Module = attached("llama", "all")
    batch = tiny.inputs("llama", rows=3)
    adapters.activate(model, ["a", "b", "c"])
    output(model, batch)
    adapters.detach(model)
    plain = frozen(tiny.build("llama"))
    assert torch.equal(output(model, batch), output(plain, batch))
    assert all(type(here) is type(there) for here, there in zip(model.modules(), plain.modules(), strict=True))
