"""A trainer for conversations and instructions alone."""

from __future__ import annotations

from adapters._errors import AdapterError
from adapters.data import DataReport
from adapters.train.sft import SFTTrainer


class InstructionTrainer(SFTTrainer):
    """An `SFTTrainer` for rows with requests and answers; the answers are learned, the requests are not.

    Raises:
        AdapterError: as `SFTTrainer`, and where the rows are plain text.
    """

    def check_data(self, report: DataReport) -> None:
        """Refuses plain text, of which every token would be learned."""
        if report.shape == "text":
            raise AdapterError(
                "the rows are plain text, without requests and answers to tell apart: adapters.train.SFTTrainer learns "
                "such rows, and columns= says which columns hold requests and answers if these do."
            )
