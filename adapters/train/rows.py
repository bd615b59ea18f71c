"""Rows of any shape to finished columns, with what the arguments of a run say about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters._errors import AdapterError
from adapters.data import DataReport, prepare
from adapters.train.layout import pack


@dataclass
class Preparation:
    """How the data sets of one run become rows of `input_ids` and `labels`.

    Args:
        tokenizer: the base's.
        args: the run's SFTConfig.
        formatting: makes the text of a row, as TRL's `formatting_func`.
        options: further arguments of `prepare`.
        check: refuses rows by the report on them.
    """

    tokenizer: Any
    args: Any
    formatting: Callable[[Any], str] | None
    options: Mapping[str, Any]
    check: Callable[[DataReport], None]
    made: list[Any] = field(default_factory=list)

    def one(self, rows: Any) -> tuple[Any, DataReport | None]:
        """Finished rows, and the report unless TRL or this object made them before."""
        if any(rows is each for each in self.made) or "seq_lengths" in (getattr(rows, "column_names", None) or ()):
            return rows, None
        if self.formatting is not None:
            if isinstance(rows, str | Path):
                raise AdapterError("formatting_func takes rows, but a file was given: read it with datasets first.")
            rows = [{"text": self.formatting(row)} for row in rows]
        args, options = self.args, {**self.options, "mask_prompt": self.args.completion_only_loss is not False}
        if args.dataset_text_field != "text" and options["columns"] is None and self.formatting is None:
            options["columns"] = {"text": args.dataset_text_field}
        prepared = prepare(rows, self.tokenizer, max_tokens=args.max_length, **options)
        self._check(prepared.report)
        made = prepared.dataset.shuffle(seed=args.seed) if args.shuffle_dataset else prepared.dataset
        self.made.append(made)
        return made, prepared.report

    def several(self, rows: Any) -> tuple[Any, dict[str, DataReport]]:
        """One evaluation set or several by name, and the reports by name."""
        if rows is None or (isinstance(rows, str) and not Path(rows).suffix):  # the name of one that is prepared
            return rows, {}
        if not isinstance(rows, Mapping):
            made, report = self.one(rows)
            return made, {"eval": report} if report is not None else {}
        found = {name: self.one(each) for name, each in rows.items()}
        reports = {name: report for name, (_, report) in found.items() if report is not None}
        return {name: made for name, (made, _) in found.items()}, reports

    def packed(self, rows: Any) -> Any:
        """The same rows, several documents in each."""
        if isinstance(rows, Mapping):
            return {name: self.packed(each) for name, each in rows.items()}
        if rows is None or isinstance(rows, str) or "seq_lengths" in rows.column_names:
            return rows
        self.made.append(pack(rows, self.args))
        return self.made[-1]

    @property
    def packs_evaluation(self) -> bool:
        """As TRL decides it."""
        return bool(self.args.packing if self.args.eval_packing is None else self.args.eval_packing)

    def _check(self, report: DataReport) -> None:
        self.check(report)
        for name in ("assistant_only_loss", "completion_only_loss"):
            if report.shape == "text" and getattr(self.args, name):
                raise AdapterError(f"{name}=True, but the rows are plain text, of which every token is learned.")
