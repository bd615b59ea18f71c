"""What must hold of a run. Each check raises an AssertionError that says what was found, or returns a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open

import adapters
from adapters._attach import adapters_of, tensors_of
from tests.trainers.bases import attached_part, build, output
from tests.trainers.cases import Case
from tests.trainers.joining import NAME, Ours, copy_of
from tests.trainers.material import IGNORED
from tests.trainers.watching import Watch, elements

CLOSE = 1e-4  # of losses
FALL, RISE = 0.05, 0.25  # a loss falls, and GRPO's reward rises, by at least this share of what it was at first
ONCE = 1.01  # of the parameters of the base and its adapters


def learns(losses: list[float], rewards: list[float]) -> tuple[float, float]:
    """The first and the last quarter's mean loss, or reward: the one must fall, the other rise."""
    values = rewards or losses
    quarter = len(values) // 4
    first, last = sum(values[:quarter]) / quarter, sum(values[-quarter:]) / quarter
    better = last > first * (1 + RISE) if rewards else last < first * (1 - FALL)
    assert better, f"the mean of the last quarter is {last:.4f}, of the first {first:.4f}"
    return first, last


def only_the_adapter_moves(case: Case, model: Any, fresh: dict[str, torch.Tensor]) -> None:
    """Every tensor of the base is bit for bit that of a fresh base, and every tensor of the adapter has moved."""
    before, after = build(case).state_dict(), model.state_dict()
    missing = before.keys() - after.keys()
    assert not missing, f"the base has lost {sorted(missing)[:3]}"
    changed = [key for key, value in before.items() if torch.is_tensor(value) and not torch.equal(value, after[key])]
    assert not changed, f"{len(changed)} tensors of the base have moved, such as {changed[0]}"
    now = tensors_of(attached_part(case, model), NAME)
    still = [key for key, tensor in now.items() if torch.equal(tensor, fresh[key])]
    assert now.keys() == fresh.keys(), "the adapter has other tensors than before"
    assert not still, f"{len(still)} of {len(now)} tensors of the adapter have not moved, such as {still[0]}"
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(tensor) for tensor in now.values()}, "something else than the adapter trains"


def checkpoint_is_the_adapter(case: Case, model: Any, folder: Path, adapter: Path) -> None:
    """The checkpoint's tensors are the adapters' and nothing else, and give a fresh base the same outputs."""
    part = attached_part(case, model)
    names = adapters_of(part)
    forbidden = [path.name for pattern in ("model*", "pytorch_model*") for path in folder.rglob(pattern)]
    forbidden = [name for name in forbidden if name.endswith((".safetensors", ".bin", ".pt"))]
    assert not forbidden, f"the checkpoint holds {forbidden}"
    files = sorted(folder.rglob("*.safetensors"))
    assert {path.name for path in files} == {"adapter_model.safetensors"}
    own = sum(tensor.numel() for tensor in tensors_of(part, NAME).values())
    assert len(files) == len(names), f"{len(files)} files of tensors for {len(names)} adapters"
    assert all(_stored(path) == own for path in files), f"{[_stored(path) for path in files]} elements, not {own}"
    for path in (*folder.rglob("optimizer.pt"), *folder.rglob("optimizer.bin")):
        moments = torch.load(path)["state"].values()
        assert sum(state["exp_avg"].numel() for state in moments) == own, f"{path.name} holds other moments"
    again = build(case)
    adapters.load(attached_part(case, again), adapter, name=NAME)
    found, expected = output(case, again), output(case, model)
    assert torch.equal(found, expected), f"loaded, the outputs differ by {(found - expected).abs().max():.2e}"
    assert not torch.equal(found, output(case, build(case))), "loaded, the adapter does nothing"


def _stored(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118 - no mapping


def one_base(case: Case, model: Any, held: int) -> float:
    """Parameters of all models that the trainer holds, as a multiple of those of the base and its adapters.

    With an attached adapter TRL takes a frozen copy of it as its reference: a further adapter, not a further base.
    """
    base = sum(map(elements, build(case).parameters()))
    adapter = sum(tensor.numel() for tensor in tensors_of(attached_part(case, model), NAME).values())
    names = sorted(adapters_of(attached_part(case, model)))
    wanted = [NAME] if case.join == "config" else [NAME, "ref"]
    assert names == wanted, f"the model has the adapters {names}, not {wanted}"
    ratio = held / (base + len(names) * adapter)
    assert ratio <= ONCE, f"{held} parameters, {ratio:.3f} times those of one base and {len(names)} adapters"
    return held / (base + adapter)


def same_losses(ours: list[float], stock: list[float]) -> float:
    """The largest difference of two runs' logged numbers, step by step."""
    assert len(ours) == len(stock) > 0, f"{len(ours)} numbers of ours, {len(stock)} of PEFT's"
    difference = max(abs(one - other) for one, other in zip(ours, stock, strict=True))
    assert difference <= CLOSE, f"the losses differ by {difference:.2e} from those with PEFT"
    return difference


def checkpointing(case: Case, watch: Watch) -> None:
    """Where it was asked for, every layer was computed again in every backward pass; else none was."""
    assert watch.layers > 0
    assert watch.forwards > 0
    wanted = case.checkpointing != "off"
    assert watch.flags == {wanted}, f"gradient_checkpointing of the layers was {watch.flags}"
    expected = watch.forwards if wanted else 0
    found = f"{watch.recomputed} recomputations for {watch.forwards} forwards of layers"
    assert watch.recomputed == expected, found


def documents_stay_apart(ours: Ours, watch: Watch, first_loss: float) -> float:
    """The first step's loss is the mean over the labelled tokens of its documents, each run alone."""
    model, rows = copy_of(ours), watch.documents()
    assert len(rows) > 1, "one document has no other to be kept apart from"
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].double()
            targets = torch.tensor(row["labels"][1:])
            total += float(F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
            count += int((targets != IGNORED).sum())
    difference = abs(total / count - first_loss)
    assert difference <= CLOSE, f"the first loss differs by {difference:.2e} from that of separate documents"
    return difference
