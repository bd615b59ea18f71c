"""What bf16 costs in accuracy, on the real model: no more than it costs TRL with PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.speed.cases import Case, calls
from benchmarks.speed.sides import sides
from benchmarks.twins import Setting, smollm2

pytest.importorskip("trl")
pytest.importorskip("peft")
BATCHES = 10


@pytest.mark.real
@pytest.mark.slow
def test_the_loss_in_bf16_is_no_further_from_fp32_than_trls(tmp_path: Path) -> None:
    rows = calls(3 * BATCHES)
    batches = [rows[i::BATCHES] for i in range(BATCHES)]
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        ours, peers, _ = sides(Case("", smollm2, lambda: batches[0], dtype), Setting(scratch=tmp_path))
        for side in (ours, peers[0]):
            found = []
            for batch in batches:
                side.rows = batch
                learned = torch.tensor(side.learned)
                with torch.no_grad():
                    loss = side.trainer.compute_loss(side.model, side.batch(), num_items_in_batch=learned)
                found.append(float(loss))
            losses[dtype, side.name] = torch.tensor(found)
    truth = losses[torch.float32, "ours"]
    torch.testing.assert_close(losses[torch.float32, "padded"], truth, rtol=1e-5, atol=1e-6)
    off = {name: float((losses[torch.bfloat16, name] - truth).norm() / truth.norm()) for name in ("ours", "padded")}
    assert 0 < off["ours"] <= 1.1 * off["padded"], off  # ten batches tell them apart no better
