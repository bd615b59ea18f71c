"""A causal language model that no table knows: attention by hand, one fused weight per branch, its own names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OddConfig(PreTrainedConfig):
    model_type = "odd"

    def __init__(self, vocab_size: int = 160, breadth: int = 64, lanes: int = 4, storeys: int = 2, **rest: Any) -> None:
        self.vocab_size, self.breadth, self.lanes, self.storeys = vocab_size, breadth, lanes, storeys
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = breadth, storeys, lanes
        super().__init__(**rest)


class Gaze(nn.Module):
    """Causal attention from one fused weight, split in the order values, queries, keys."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        self.lanes = config.lanes
        self.blend = nn.Linear(config.breadth, 3 * config.breadth)
        self.gather = nn.Linear(config.breadth, config.breadth)

    def forward(self, stream: Tensor, hidden: Tensor) -> Tensor:
        rows, tokens, breadth = stream.shape
        lanes = [t.view(rows, tokens, self.lanes, -1).transpose(1, 2) for t in self.blend(stream).chunk(3, -1)]
        v, q, k = lanes
        scores = (q @ k.transpose(-1, -2)) / k.shape[-1] ** 0.5
        mixed = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1) @ v
        return self.gather(mixed.transpose(1, 2).reshape(rows, tokens, breadth))


class Chew(nn.Module):
    """A gated MLP whose fused weight yields the plain half first and the gate second."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        self.bite = nn.Linear(config.breadth, 4 * config.breadth, bias=False)
        self.swallow = nn.Linear(2 * config.breadth, config.breadth, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        plain, gate = self.bite(stream).chunk(2, -1)
        return self.swallow(plain * F.gelu(gate))


class Storey(nn.Module):
    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        self.calm, self.gaze = nn.LayerNorm(config.breadth), Gaze(config)
        self.still, self.chew = nn.LayerNorm(config.breadth), Chew(config)

    def forward(self, stream: Tensor, hidden: Tensor) -> Tensor:
        stream = stream + self.gaze(self.calm(stream), hidden)
        return self.chew(self.still(stream)) + stream


class OddForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OddConfig
    base_model_prefix = "tower"

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.breadth)
        self.storeys = nn.ModuleList(Storey(config) for _ in range(config.storeys))
        self.finish = nn.LayerNorm(config.breadth)
        self.speak = nn.Linear(config.breadth, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        return self.speak

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **unused: Any
    ) -> CausalLMOutput:
        tokens = input_ids.shape[1]
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=input_ids.device).triu(1)[None, None]
        if attention_mask is not None:
            hidden = hidden | (attention_mask == 0)[:, None, None]
        stream = self.words(input_ids)
        for storey in self.storeys:
            stream = storey(stream, hidden)
        logits = self.speak(self.finish(stream))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
