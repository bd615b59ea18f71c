"""TRL's SFTTrainer over rows of any shape, with an adapter of any method and a head that runs only where labels are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
import trl
from rich.console import Console

from adapters._attach import AttachReport
from adapters._store import LoadReport
from adapters._trainers.trainer import attached_within
from adapters.data import DataReport
from adapters.train import adopt, options
from adapters.train.ahead import started
from adapters.train.batches import PaddedRows
from adapters.train.documents import split_rows
from adapters.train.layout import choose_packing, make_collator, obstacle
from adapters.train.loss import Scored, score, takes_columns, takes_pieces
from adapters.train.packing import Packing, mask_dtype
from adapters.train.preflight import Preflight
from adapters.train.recipe import Training
from adapters.train.rows import Preparation
from adapters.train.steps import settings, show_steps
from adapters.train.tally import Tally, without_repeats


class SFTTrainer(trl.SFTTrainer):  # type: ignore[misc]
    """Trains an adapter on rows of any shape, and is TRL's SFTTrainer in everything else.

    The loss of a step is the mean over all its labelled tokens, however they fall into micro-batches, rows and
    processes; `eval_loss` is the mean over those of the evaluation set. A loss that TRL computes in another way
    (`loss_type`, `label_smoothing_factor`, `compute_loss_func`) is left to TRL, `eval_loss` included.

    Args:
        model: a name for `load_base` (an embedded one, a Hub id or a folder; `args.model_init_kwargs` go along), a
            model, a model with an adapter, or a PeftModel, whose training is TRL's own.
        args: an SFTConfig; it is copied. `max_length` is the longest row, in tokens. `packing=True` fills rows of
            `max_length` tokens, by TRL's own strategy, with documents that are proven to stay apart;
            `padding_free=True` is `layout="packed"`. `completion_only_loss=False` learns prompts as well; True, like
            `assistant_only_loss=True`, is what happens anyway.
        data_collator: makes batches of rows of `input_ids` and `labels`; None takes the one of `layout`.
        train_dataset: rows as `adapters.data.prepare` takes them.
        eval_dataset: the same, or a dictionary of several.
        processing_class: the tokenizer; None finds the one that came with the model.
        trl_arguments: all others that TRL's trainer has, such as `callbacks`, `compute_metrics`, `optimizers`.
        adapter: what to train: a method's name, a method, a mapping such as `{"name": "lora", "rank": 16}` (`targets`
            and `head` are arguments of `attach`), or a folder or Hub id of a saved adapter to go on with. None goes on
            with the one on the model.
        learn: "all" answers of the assistant, or only the "last" of each row.
        columns, roles, system, tools, too_long: as `adapters.data.prepare` takes them.
        layout: "packed" puts the rows of a micro-batch one after the other, "padded" below each other; "auto" does
            what costs less where the model keeps documents apart, and pads where it does not. The loss is the same.

        preflight: tries the run out when `train` is called, and watches it; see `try_out` and `Watchdog`.

    Attributes:
        attached: the report on the adapter, or None where it was on the model.
        data: the report on the training rows; `eval_data` holds those on the evaluation sets, by name.
        packing: how rows may share a forward, and why.
        tried: the preflight, once `train` was called.
        learned: labelled tokens that training went through, in this process.

    Raises:
        AdapterError: before the model is changed, or with the adapter taken off again.
    """

    attached: AttachReport | LoadReport | None
    packing: Packing
    tried: Preflight | None = None
    learned: int = 0
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        adapter: adopt.Adapter | None = None,
        learn: str = "all",
        columns: Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
        system: str | None = None,
        tools: Sequence[Any] | None = None,
        too_long: str = "drop",
        layout: str = "auto",
        preflight: bool = True,
        **trl_arguments: Any,
    ) -> None:
        asked, want = options.own_copy(args, model), adopt.of_config(adopt.wanted(adapter), trl_arguments)
        options.check(asked, learn, layout)
        self._tries = preflight
        config, formatting = (trl_arguments.pop(key, None) for key in ("quantization_config", "formatting_func"))
        model, processing = adopt.opened(model, processing_class, want, asked, config)
        adopt.check_adapter(model, want, trl_arguments.get("peft_config"))
        tokenizer = getattr(processing, "tokenizer", processing)
        options.apply_to_tokenizer(asked, tokenizer)
        how = {"learn": learn, "columns": columns, "roles": roles, "system": system, "tools": tools}
        self._rows = Preparation(tokenizer, asked, formatting, {**how, "too_long": too_long}, self.check_data)
        train, self.data = self._rows.one(train_dataset)
        evaluation, self.eval_data = self._rows.several(eval_dataset)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._padded = PaddedRows(pad or 0, asked.pad_to_multiple_of)
        transformers.set_seed(asked.seed)  # of the fresh tensors
        with adopt.adapted(model, want, tokenizer) as self.attached:
            before = adopt.before_trl(model)
            collator = data_collator if data_collator is not None else self._padded
            super().__init__(model, options.for_trl(asked), collator, train, evaluation, processing, **trl_arguments)
            self._settle(asked, layout, collator is self._padded)
            adopt.put_back(model, before, forward=self._left_to_trl is None)

    def check_data(self, report: DataReport) -> None:
        """Refuses rows that this trainer is not for; called with the report on each data set."""

    def _settle(self, asked: Any, layout: str, ours: bool) -> None:
        """Chooses loss, layout and collator, now that the model is where it trains; `ours`: the collator is."""
        options.restore(self.args, asked)
        parallel = self.accelerator.parallelism_config
        self._left_to_trl = options.left_to_trl(self.model, asked, self.compute_loss_func, parallel)
        against = obstacle(self.model, asked, None if ours else self.data_collator, parallel)
        balanced = "the balance of experts is computed with a mask of padding" if self.aux_loss_enabled else None
        with self.accelerator.autocast():
            self.packing = choose_packing(self.model, layout, asked, against, self._left_to_trl or balanced)
            self._columns_only = self._left_to_trl is None and takes_columns(self.model)
            self._in_pieces = self._left_to_trl is None and takes_pieces(self.model)
        self._mask = mask_dtype(self.model) if self.packing.kind == "masked" else None
        if self.packing.by_document:
            split_rows(self)
        if ours:
            self.data_collator = make_collator(self.packing, layout, asked, self.model, self._padded)
        if asked.packing:
            self.train_dataset = self._rows.packed(self.train_dataset)
        if self._rows.packs_evaluation:
            self.eval_dataset = self._rows.packed(self.eval_dataset)
        if self._left_to_trl is None:
            self.model_accepts_loss_kwargs = True  # a step's tokens are counted whatever the forward accepts
        self._tokens, self._sums = 0, {"train": Tally(), "eval": Tally()}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it, after a preflight that nothing failed in.

        Raises:
            AdapterError: the preflight failed and nothing was trained, or the watchdog stopped the run.
        """
        if self._tries and attached_within(self.model) is not None:
            self.tried = started(self)
        return super().train(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the labelled tokens of the step, of which a micro-batch contributes its part."""
        if self._left_to_trl is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training and not self._rows.packs_evaluation:
            inputs = without_repeats(self.accelerator, inputs, self.args.per_device_eval_batch_size)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        columns_only, by_document = self._columns_only and not return_outputs, self.packing.by_document
        pieces = self._in_pieces and not return_outputs
        found = score(model, inputs, columns_only, self._mask, by_document, pieces, **router)
        self._count(found, inputs)
        loss = found.total / torch.as_tensor(found.count if num_items_in_batch is None else num_items_in_batch).clamp(1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # gradients are averaged over processes, tokens were summed
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            parts = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * found.outputs.aux_loss / parts
        return (loss, found.outputs) if return_outputs else loss

    def _count(self, found: Scored, inputs: Mapping[str, Any]) -> None:
        mode = "train" if self.model.training else "eval"
        before, self._sums[mode] = self._sums[mode], self._sums[mode].plus(found)
        if self.aux_loss_enabled:
            self._metrics[mode]["aux_loss"].append(float(found.outputs.aux_loss.detach()))
        if mode == "train":
            self.learned += round(self._sums[mode].count - before.count)
            mask = inputs.get("attention_mask")
            self._tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As transformers does it, with the loss averaged over labelled tokens instead of over batches."""
        self._sums["eval"] = Tally()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = self._sums["eval"].over_processes(self.accelerator)
        if sums.count:
            output.metrics[f"{metric_key_prefix}_loss"] = sums.loss
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the numbers that TRL logs, over labelled tokens."""
        mode = "train" if self.model.training else "eval"
        sums, self._sums[mode] = self._sums[mode].over_processes(self.accelerator), Tally()
        if sums.count:
            tokens = Tally(count=self._tokens).over_processes(self.accelerator).count
            self._metrics[mode].update({**sums.metrics(), "num_tokens": [tokens]})
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers does it, on rows of any shape, or a dictionary of several sets."""
        rows, reports = self._rows.several(eval_dataset)
        self.eval_data.update(reports)
        rows = self._rows.packed(rows) if self._rows.packs_evaluation else rows
        found: dict[str, float] = super().evaluate(rows, *args, **kwargs)
        return found

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it, on rows of any shape."""
        return super().predict(self._rows.one(test_dataset)[0], *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Rows of their own where their logits are wanted, else the layout of training."""
        with self._padding(self.compute_metrics is not None):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Rows of their own, so that predictions can be told apart."""
        with self._padding(True):
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _padding(self, wanted: bool) -> Iterator[None]:
        before = self.data_collator
        self.data_collator = self._padded if wanted and self.packing.kind != "padded" else before
        try:
            yield
        finally:
            self.data_collator = before

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # without a mask, transformers would take an end of turn that is also the padding token for padding
        mask = {} if "attention_mask" in inputs else {"attention_mask": torch.ones_like(inputs["input_ids"])}
        super()._track_num_input_tokens({**inputs, **mask})


def make_trainer(model: Any, tokenizer: Any, rows: Any, training: Training, folder: str, console: Console) -> Any:
    """A trainer over rows of `input_ids` and `labels` (a `datasets.Dataset`), with a bar over its steps."""
    arguments = trl.SFTConfig(**settings(training, folder), max_length=None)
    # a recipe has a preflight of its own
    given = {"train_dataset": rows, "processing_class": tokenizer, "layout": "padded", "preflight": False}
    trainer = SFTTrainer(model, arguments, **given)
    show_steps(trainer, console)
    return trainer
