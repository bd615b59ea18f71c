"""The trainers: the loss they report and the tensors they move, against full logits and against TRL with PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import adapters
from adapters import AdapterError
from adapters.data import prepare
from adapters.train import InstructionTrainer, SFTTrainer, Watchdog, try_out

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"instruction": f"say {word} {n} times", "output": " ".join([word] * n)}
    for n, word in enumerate(["ant", "bee", "crow", "dingo", "emu", "fox", "gnu", "hippopotamus"], 1)
]
TEXTS = [{"text": f"a plain text about {row['output']}"} for row in ROWS]


def tokens() -> Any:
    """Single bytes and the tokens of ChatML; the padding token ends every turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=["<|im_start|>"], **special)
    tokenizer.chat_template = CHATML
    return tokenizer


def llama(seed: int = 0, hidden: int = 32, wide: int = 48) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 256, "eos_token_id": 256, "bos_token_id": None}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=260, num_key_value_heads=2, **sizes, **special))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)  # attention over so few dimensions is all but uniform otherwise
    return model.eval()


def arguments(folder: Path, **changed: Any) -> trl.SFTConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 200,
        "use_cpu": True,
    }
    return trl.SFTConfig(**{**settings, **changed})


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def full_mean(model: Any, rows: Any) -> float:
    """The mean over all labelled tokens, each row alone and over full logits; nothing of `adapters.train` is used."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad():
        for row in rows:
            logits = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
            targets = torch.tensor(row["labels"][1:])
            total += F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            count += int((targets != -100).sum())
    return float(total) / count


class Batches(hf.TrainerCallback):  # type: ignore[misc]
    """What every forward of a training was given."""

    def __init__(self, model: Any) -> None:
        self.seen: list[dict[str, Any]] = []
        self.handle = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: self.seen.append(dict(kwargs)), with_kwargs=True
        )

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seen.clear()  # of the probe

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.handle.remove()


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix"])
def test_the_loss_of_a_step_is_the_mean_over_its_labelled_tokens(method: str, tmp_path: Path) -> None:
    model, tokenizer = llama(), tokens()
    model.accepts_loss_kwargs = method == "lora"  # without it, transformers would average over micro-batches
    args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=4)
    trainer = SFTTrainer(model, args, None, ROWS, None, tokenizer, adapter=method)
    assert trainer.packing.kind == "packed"
    assert trainer.data.shape == "alpaca"
    assert trainer.data.kept == trainer.data.rows == 8
    rows = prepare(ROWS, tokenizer).dataset
    lengths = {sum(label != -100 for label in row["labels"]) for row in rows}
    assert len(lengths) > 4  # a mean over micro-batches, or over rows, would be another number
    with adapters.using(model, "default"):
        expected = full_mean(model, rows)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, abs=2e-6)
    assert trainer.learned == trainer.data.learned_tokens
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["num_tokens"] == trainer.data.tokens
    assert 0 <= log["mean_token_accuracy"] <= 1
    assert log["entropy"] > 0


def test_both_layouts_learn_the_same_and_only_the_adapter_moves(tmp_path: Path) -> None:
    found, trained = {}, {}
    for layout in ("packed", "padded", "auto"):
        model = llama()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        batches = Batches(model)
        args = arguments(tmp_path, include_num_input_tokens_seen="non_padding")
        trainer = SFTTrainer(
            model, args, None, ROWS, None, tokens(), adapter="lora", layout=layout, callbacks=[batches]
        )
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        trainer.train()
        after = dict(model.named_parameters())
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert set(after) - set(before) == set(start)
        assert all(not torch.equal(after[name], tensor) for name, tensor in start.items())
        rows = {len(batch["input_ids"]) for batch in batches.seen}
        assert rows == ({2} if layout == "padded" else {1} if layout == "packed" else rows)
        assert trainer.state.num_input_tokens_seen == sum(_real_tokens(batch) for batch in batches.seen)
        assert "forward" not in vars(model)  # TRL's fused head is gone again
        found[layout], trained[layout] = losses(trainer), {name: after[name].detach() for name in start}
    assert found["packed"] == pytest.approx(found["padded"], abs=1e-5)
    assert found["auto"] == pytest.approx(found["padded"], abs=1e-5)
    for name, tensor in trained["packed"].items():
        torch.testing.assert_close(tensor, trained["padded"][name], rtol=1e-3, atol=2e-4)


def _real_tokens(batch: dict[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()


def test_the_losses_are_those_of_trl_with_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tokenizer = tokens()
    chats = [
        {
            "prompt": [{"role": "user", "content": row["instruction"]}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for row in ROWS
    ]
    rows = prepare(chats, tokenizer).dataset
    stock_model = llama()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    stock = trl.SFTTrainer(
        stock_model,
        arguments(tmp_path / "stock", dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, max_steps=5),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=config,
    )
    theirs = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p
        for name, p in stock.model.named_parameters()
        if "lora_" in name
    }
    model = llama()
    trainer = SFTTrainer(
        model,
        arguments(tmp_path / "ours", max_steps=5),
        None,
        chats,
        None,
        tokens(),
        adapter={"name": "lora", "rank": 4, "alpha": 8.0},
    )
    copied = 0
    with torch.no_grad():
        for path, module in model.named_modules():
            for kind in ("a", "b"):
                source = theirs.get(f"{path}.lora_{kind.upper()}")
                if source is None:
                    continue
                own = [p for name, p in module.named_parameters() if name.endswith(f".{kind}")]
                assert len(own) == 1
                own[0].copy_(source)
                copied += 1
    assert copied == len(theirs) == 2 * 2 * 7
    stock.train()
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(stock), abs=1e-4)
    assert losses(trainer)[0] - losses(trainer)[-1] > 0.1  # it did learn
    ours, others = (t.state.log_history[0] for t in (trainer, stock))
    assert set(others) == set(ours)  # every number that TRL logs is logged
    assert ours["num_tokens"] == others["num_tokens"]


def test_the_evaluation_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    model, tokenizer = llama(), tokens()
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"rows": float(len(prediction.predictions))}

    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    sets = {"short": ROWS[:4], "long": ROWS[4:]}
    trainer = SFTTrainer(model, args, None, ROWS, sets, tokenizer, adapter="lora", layout="packed")
    assert set(trainer.eval_data) == {"short", "long"}
    trainer.train()
    rows = prepare(ROWS, tokenizer).dataset
    assert len([entry for entry in trainer.state.log_history if "eval_short_loss" in entry]) == 2
    found = trainer.evaluate()
    assert found["eval_short_loss"] == pytest.approx(full_mean(model, rows.select(range(4))), abs=2e-6)
    assert found["eval_long_loss"] == pytest.approx(full_mean(model, rows.select(range(4, 8))), abs=2e-6)
    assert trainer.evaluate(ROWS)["eval_loss"] == pytest.approx(full_mean(model, rows), abs=2e-6)
    five = full_mean(model, rows.select(range(5)))
    assert trainer.evaluate({"a": ROWS[:5]})["eval_a_loss"] == pytest.approx(five, abs=2e-6)
    trainer.compute_metrics = metrics
    assert trainer.evaluate(ROWS)["eval_rows"] == 8
    assert seen[0].predictions.shape == (8, max(map(len, rows["input_ids"])), 260)
    predicted = trainer.predict(ROWS[:3])
    assert predicted.predictions.shape[0] == 3
    assert predicted.metrics["test_loss"] == pytest.approx(full_mean(model, rows.select(range(3))), abs=2e-6)


def test_rows_filled_with_documents(tmp_path: Path) -> None:
    model, tokenizer = llama(), tokens()
    args = arguments(tmp_path, packing=True, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=9)
    trainer = SFTTrainer(model, args, None, ROWS, ROWS[:5], tokenizer, adapter="prefix")
    bins = trainer.train_dataset
    assert 1 < len(bins) < len(ROWS)
    assert max(map(sum, bins["seq_lengths"])) <= 200
    assert sum(map(len, bins["seq_lengths"])) == len(ROWS)
    assert (trainer.args.packing, trainer.args.max_length) == (True, 200)
    rows = prepare(ROWS, tokenizer).dataset
    expected = full_mean(model, rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(full_mean(model, rows.select(range(5))), abs=2e-6)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, abs=2e-6)


def test_what_cannot_share_a_row_is_padded_or_refused_with_the_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "n_head": 4, "n_layer": 1, "vocab_size": 260}
    bloom = hf.BloomForCausalLM(hf.BloomConfig(**sizes, pad_token_id=256, eos_token_id=256, bos_token_id=1))
    given = {"train_dataset": ROWS, "processing_class": tokens(), "adapter": "lora"}
    for changed, layout in (({"packing": True}, "auto"), ({"padding_free": True}, "auto"), ({}, "packed")):
        with pytest.raises(AdapterError, match="cannot share a row here: the model takes no position_ids"):
            SFTTrainer(bloom, arguments(tmp_path, **changed), layout=layout, **given)
        assert adapters.adapters_of(bloom) == {}  # it was taken off again
        assert all(parameter.requires_grad for parameter in bloom.parameters())
    trainer = SFTTrainer(bloom, arguments(tmp_path, max_steps=1, gradient_accumulation_steps=4), **given)
    assert trainer.packing.kind == "padded"
    expected = full_mean(bloom, prepare(ROWS, tokens()).dataset)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, abs=2e-6)
    noisy = SFTTrainer(llama(), arguments(tmp_path, neftune_noise_alpha=5.0), **given)
    assert noisy.packing.kind == "padded"
    assert "NEFTune" in noisy.packing.reason


def test_going_on_from_a_folder_and_with_an_attached_adapter(tmp_path: Path) -> None:
    tokenizer, args = tokens(), arguments(tmp_path, max_steps=1, gradient_accumulation_steps=4)
    first = llama()
    trainer = SFTTrainer(first, args, None, ROWS, None, tokenizer, adapter=adapters.methods.get("lora")(rank=3))
    assert "LoRA(rank=3" in trainer.attached.method
    trainer.train()
    adapters.save(first, "default", tmp_path / "saved")
    expected = full_mean(first, prepare(ROWS, tokenizer).dataset)

    second = llama()
    on = SFTTrainer(second, args, None, ROWS, None, tokenizer, adapter=tmp_path / "saved")
    assert type(on.attached).__name__ == "LoadReport"
    on.train()
    assert losses(on)[0] == pytest.approx(expected, abs=2e-6) != losses(trainer)[0]

    frozen = llama()
    adapters.load(frozen, tmp_path / "saved")
    with pytest.raises(AdapterError, match=r"\(default\) are frozen.*trainable=True"):
        SFTTrainer(frozen, args, None, ROWS, None, tokenizer)
    adapters.detach(frozen)
    adapters.load(frozen, tmp_path / "saved", trainable=True)
    third = SFTTrainer(frozen, args, None, ROWS, None, tokenizer)
    assert third.attached is None
    third.train()
    assert losses(third) == losses(on)


def test_a_base_by_its_folder_with_its_tokenizer_and_dtype(tmp_path: Path) -> None:
    llama(hidden=64, wide=128).save_pretrained(tmp_path / "base")  # whole blocks of 4 bits
    tokens().save_pretrained(tmp_path / "base")
    args = arguments(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    trainer = SFTTrainer(str(tmp_path / "base"), args, train_dataset=ROWS, adapter="lora")
    assert trainer.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert trainer.processing_class.chat_template == CHATML
    quantised = SFTTrainer(str(tmp_path / "base"), arguments(tmp_path), train_dataset=ROWS, adapter="qlora")
    assert any(type(p).__name__ == "Params4bit" for p in quantised.model.parameters())
    assert {p.dtype for p in quantised.model.parameters() if p.requires_grad} == {torch.float32}
    named = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (
        SFTTrainer(named, arguments(tmp_path), train_dataset=ROWS, adapter="lora").processing_class.eos_token_id == 256
    )
    with pytest.raises(AdapterError, match="loaded already"):
        SFTTrainer(llama(), args, train_dataset=ROWS, processing_class=tokens(), adapter="lora")


def test_the_dtype_of_trained_tensors_is_kept_where_trl_would_change_it(tmp_path: Path) -> None:
    model = llama()
    model.is_loaded_in_4bit = True
    adapters.attach(model, "lora")
    trl.SFTTrainer(
        copy.deepcopy(model),
        arguments(tmp_path, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=prepare(ROWS, tokens()).dataset,
        processing_class=tokens(),
    )
    SFTTrainer(model, arguments(tmp_path), train_dataset=ROWS, processing_class=tokens())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_the_callers_arguments_are_never_changed(tmp_path: Path) -> None:
    kwargs = {"dataset_kwargs": {"skip_prepare_dataset": False}, "gradient_checkpointing_kwargs": {"selective": False}}
    args = arguments(tmp_path, padding_free=True, **kwargs)
    before = copy.deepcopy(args.to_dict())
    trainer = SFTTrainer(llama(), args, None, ROWS, None, tokens(), adapter="lora")
    trainer.train()
    assert args.to_dict() == before
    assert trainer.args is not args
    assert type(trainer.data_collator).__name__ == "OneRow"


def test_the_balance_of_experts_is_part_of_the_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    config = hf.Qwen3MoeConfig(vocab_size=260, num_key_value_heads=2, **sizes, **experts, router_aux_loss_coef=0.5)
    model = hf.Qwen3MoeForCausalLM(config)
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    trainer = SFTTrainer(model, args, None, ROWS, None, tokens(), adapter="lora", layout="padded")
    batch = trainer.data_collator(list(prepare(ROWS, tokens()).dataset))
    with torch.no_grad():
        whole = model(**batch, output_router_logits=True)
    trainer.train()
    assert float(whole.aux_loss) > 1
    assert losses(trainer)[0] == pytest.approx(float(whole.loss), abs=1e-5)  # transformers adds the balance to it
    for coefficient in (0.5, 0.0):  # over two micro-batches, and switched off
        args = arguments(tmp_path, max_steps=1, router_aux_loss_coef=coefficient, per_device_train_batch_size=4)
        expected = full_mean(model, prepare(ROWS, tokens()).dataset)
        again = SFTTrainer(model, args, None, ROWS, None, tokens(), layout="padded")
        again.train()
        log = again.state.log_history[0]
        assert log["loss"] == pytest.approx(expected + coefficient * log.get("aux_loss", 0.0), abs=1e-5)
    assert "aux_loss" not in again.state.log_history[0]


@pytest.mark.parametrize("changed", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.2}])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_other_losses_are_trls_own(changed: dict[str, Any], tmp_path: Path) -> None:
    rows, model = prepare(ROWS, tokens()).dataset, llama()
    adapters.attach(model, "lora", rank=2)
    stock = trl.SFTTrainer(
        copy.deepcopy(model),
        arguments(tmp_path, dataset_kwargs={"skip_prepare_dataset": True}, **changed),
        train_dataset=rows,
        processing_class=tokens(),
    )
    trainer = SFTTrainer(model, arguments(tmp_path, **changed), None, ROWS, None, tokens())
    stock.train()
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(stock), abs=1e-4)
    plain = SFTTrainer(llama(), arguments(tmp_path), None, ROWS, None, tokens(), adapter="lora")
    plain.train()
    assert abs(losses(plain)[0] - losses(trainer)[0]) > 0.01


def test_a_fused_loss_that_misses_an_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    adapter = {"name": "lora", "targets": ["lm_head"]}
    with pytest.raises(AdapterError, match="output layer's weight without its adapter"):
        SFTTrainer(llama(), arguments(tmp_path, loss_type="dft"), None, ROWS, None, tokens(), adapter=adapter)


def test_an_adapter_on_the_head_is_trained_by_our_loss(tmp_path: Path) -> None:
    model, args = llama(), arguments(tmp_path, max_steps=2, gradient_accumulation_steps=4)
    trainer = SFTTrainer(
        model, args, None, ROWS, None, tokens(), adapter={"name": "lora", "targets": ["lm_head"], "rank": 2}
    )
    start = [p.detach().clone() for p in model.lm_head.parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in model.lm_head.parameters() if p.requires_grad]
    assert len(after) == 2
    assert all(not torch.equal(old, new) for old, new in zip(start, after, strict=True))
    assert losses(trainer)[1] < losses(trainer)[0]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_mask_keeps_documents_apart_where_positions_do_not(bf16: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    }
    special = {"pad_token_id": 256, "eos_token_id": 256, "bos_token_id": 1}
    model = hf.OPTForCausalLM(hf.OPTConfig(vocab_size=260, dropout=0.0, **sizes, **special))
    args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=4, bf16=bf16)
    trainer = SFTTrainer(model, args, None, ROWS, ROWS[:3], tokens(), adapter="lora", layout="packed")
    assert trainer.packing.kind == "masked"
    rows = prepare(ROWS, tokens()).dataset
    expected, close = full_mean(model, rows), 2e-2 if bf16 else 2e-6
    assert trainer.evaluate()["eval_loss"] == pytest.approx(full_mean(model, rows.select(range(3))), abs=close)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, abs=close)


def test_what_is_learned(tmp_path: Path) -> None:
    chat = [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}
        for turns in (("hi", "hello", "more", "some more"), ("one", "two", "three", "four and five"))
    ]

    def learned(rows: Any, args: dict[str, Any], **given: Any) -> int:
        trainer = SFTTrainer(llama(), arguments(tmp_path, **args), None, rows, None, tokens(), adapter="lora", **given)
        return int(trainer.data.learned_tokens)

    answers = sum(len(turn["content"]) + 1 for row in chat for turn in row["messages"] if turn["role"] == "assistant")
    last = sum(len(row["messages"][-1]["content"]) + 1 for row in chat)
    assert learned(chat, {}) == learned(chat, {"assistant_only_loss": True}) == answers
    assert learned(chat, {}, learn="last") == last
    assert learned(ROWS, {"completion_only_loss": False}) > learned(ROWS, {"completion_only_loss": True})
    bodies = [{"body": row["text"]} for row in TEXTS]
    assert learned(bodies, {"dataset_text_field": "body"}) == learned(TEXTS, {})
    assert learned(bodies, {}, formatting_func=lambda row: row["body"]) == learned(TEXTS, {})
    cut = SFTTrainer(llama(), arguments(tmp_path, max_length=60), None, ROWS, None, tokens(), adapter="lora")
    assert 0 < cut.data.kept < 8
    assert max(map(len, cut.train_dataset["input_ids"])) <= 60


def test_instructions_and_conversations_only(tmp_path: Path) -> None:
    trainer = InstructionTrainer(llama(), arguments(tmp_path), None, ROWS, None, tokens(), adapter="lora")
    assert isinstance(trainer, SFTTrainer)
    assert trainer.data.share < 0.7
    model = llama()
    with pytest.raises(AdapterError, match=r"the rows are plain text.*adapters\.train\.SFTTrainer"):
        InstructionTrainer(model, arguments(tmp_path), None, TEXTS, None, tokens(), adapter="lora")
    assert adapters.adapters_of(model) == {}
    with pytest.raises(AdapterError, match="the rows are plain text"):
        trainer.evaluate(TEXTS)


@pytest.mark.parametrize(
    ("changed", "given", "sentence"),
    [
        ({}, {"adapter": None}, "the model has no adapter.*adapter='lora'.*adapters.attach"),
        ({}, {"adapter": "lroa"}, "neither a method; did you mean 'lora'"),
        ({}, {"adapter": {"rank": 3}}, "needs a name"),
        ({}, {"adapter": {"name": "lora", "rnak": 3}}, "no field 'rnak'; did you mean 'rank'"),
        ({}, {"layout": "pakced"}, "did you mean 'packed'"),
        ({}, {"processing_class": None}, "no tokenizer was found.*processing_class="),
        ({"packing": True, "packing_strategy": "wrapped"}, {}, "'wrapped' cuts documents"),
        ({"packing": True, "max_length": None}, {}, "max_length is None"),
        ({"packing": True}, {"layout": "padded"}, "contradict each other"),
        ({"pad_to_multiple_of": 8}, {"layout": "packed"}, "pad_to_multiple_of=8 asks for padded rows"),
        ({"assistant_only_loss": True}, {"learn": "last"}, "both say what is learned"),
        ({"completion_only_loss": True}, {"train_dataset": TEXTS}, "completion_only_loss=True, but the rows are plain"),
        ({"chat_template_path": "org/model"}, {}, "no Jinja file"),
        ({}, {"train_dataset": None}, "rows is a NoneType"),
    ],
)
def test_refusals_change_nothing(changed: dict[str, Any], given: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    model = llama()
    model.config._name_or_path = model.name_or_path = ""
    usual = {"train_dataset": ROWS, "processing_class": tokens(), "adapter": "lora"}
    with pytest.raises(AdapterError, match=sentence):
        SFTTrainer(model, arguments(tmp_path, **changed), **{**usual, **given})
    assert adapters.adapters_of(model) == {}
    assert type(model) is hf.LlamaForCausalLM
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_of_pefts_is_left_to_trl(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(AdapterError, match="is a PeftModel, which has an adapter"):
        SFTTrainer(model, arguments(tmp_path), None, ROWS, None, tokens(), adapter="lora")
    trainer = SFTTrainer(
        model, arguments(tmp_path, max_steps=1, gradient_accumulation_steps=4), None, ROWS, None, tokens()
    )
    assert trainer.packing.kind == "padded"
    expected = full_mean(model, prepare(ROWS, tokens()).dataset)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, abs=1e-5)


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        args = arguments(tmp_path, gradient_checkpointing=checkpointing)
        trainer = SFTTrainer(llama(), args, None, ROWS, None, tokens(), adapter="prefix", layout="packed")
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_run_is_tried_out_before_its_first_step_and_watched(tmp_path: Path) -> None:
    trainer = SFTTrainer(
        llama(), arguments(tmp_path, max_steps=2), train_dataset=ROWS, processing_class=tokens(), adapter="lora"
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    plain = SFTTrainer(
        llama(),
        arguments(tmp_path, max_steps=2),
        train_dataset=ROWS,
        processing_class=tokens(),
        preflight=False,
        adapter="lora",
    )
    assert all(torch.equal(before[name], p) for name, p in plain.model.named_parameters())
    trainer.train()
    plain.train()
    assert trainer.tried.passed
    assert plain.tried is None
    # what was tried left no trace: not in the random numbers, not in the counts
    assert losses(trainer) == losses(plain)
    assert trainer.learned == plain.learned
    assert any(isinstance(each, Watchdog) for each in trainer.callback_handler.callbacks)
    assert not any(isinstance(each, Watchdog) for each in plain.callback_handler.callbacks)


def test_a_run_that_cannot_work_is_stopped_before_it_starts(tmp_path: Path) -> None:
    trainer = SFTTrainer(
        llama(),
        arguments(tmp_path, max_steps=2, learning_rate=0.0),
        train_dataset=ROWS,
        processing_class=tokens(),
        adapter="lora",
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(AdapterError, match=r"the preflight failed and nothing was trained: .*learning rate"):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert trainer.state.global_step == 0


def test_any_trainer_can_be_tried_out(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = llama()
    adapters.attach(model, "lora", rank=2)
    settings = {"use_cpu": True, "report_to": [], "max_steps": 3}
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}, {"input_ids": [9, 3, 4, 5], "labels": [9, 3, 4, 5]}]
    found = try_out(Trainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=rows))
    assert found.passed
    assert any("get a gradient" in check.what for check in found.checks)
    late = TrainingArguments(str(tmp_path), warmup_steps=9, **settings)
    assert any("warm-up" in check.what for check in try_out(Trainer(model, late, train_dataset=rows)).failures)
