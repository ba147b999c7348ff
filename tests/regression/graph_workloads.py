"""The selection set of bench_graphs.py: what CUDA graphs help, what they cannot hold, and what they make slower.

Shapes: B batch, T tokens or steps, D width. Every workload is a ring of calls at addresses of their own; `tiny` shrinks all of it
for a CPU, to debug the benchmark."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Args = tuple[Any, ...]


@dataclass
class Workload:
    """model: in eval mode, or None for a training step. ring: makes the argument tuples of a ring of calls from a generator.
    in_place: arguments that stay where they are: caches, and the input that a caller fills in place. by_hand: what a person does
    to the model before capturing it. extra: overrides of further arms of ours. losses: of a training step."""

    ring: Callable[[torch.Generator], list[Args]]
    model: nn.Module | None = None
    in_place: tuple[int, ...] = ()
    mutates: tuple[int, ...] = ()
    tolerance: float = 1e-3
    dynamic: bool = False
    by_hand: Callable[[nn.Module], nn.Module] = lambda model: model
    extra: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    train_model: Callable[[], nn.Module] | None = None
    loss: Callable[..., torch.Tensor] | None = None


def ready(model: nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    return model.to(device, dtype).eval()


def normal(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=g, device=g.device, dtype=dtype)


def integers(g: torch.Generator, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=g, device=g.device)


def mlp(device: torch.device, tiny: bool) -> Workload:
    """Eight layers of 256, batch 64: launches take most of the time."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.ReLU())]
    return Workload(lambda g: [(normal(g, 64, 256),) for _ in range(4)], ready(nn.Sequential(*layers), device))


class Gru(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.gru(x_BTD)[0]


class GruLoop(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(width, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        state, states = x_BTD.new_zeros(x_BTD.shape[0], x_BTD.shape[2]), []
        for x in x_BTD.unbind(1):
            state = self.cell(x, state)
            states.append(state)
        return torch.stack(states, 1)


def gru(device: torch.device, tiny: bool) -> Workload:
    """nn.GRU, 50 steps of 256, batch 16: one library call that torch.compile does not enter."""
    steps = 5 if tiny else 50
    return Workload(lambda g: [(normal(g, 16, steps, 256),) for _ in range(4)], ready(Gru(256), device))


def gru_loop(device: torch.device, tiny: bool) -> Workload:
    """nn.GRUCell in a loop of 50 steps of 256, batch 16."""
    steps = 5 if tiny else 50
    return Workload(lambda g: [(normal(g, 16, steps, 256),) for _ in range(4)], ready(GruLoop(256), device))


class Recommender(nn.Module):
    """DLRM (arXiv:1906.00091) in small: embeddings, pairwise products, two MLPs. Its pair indices and its temperature are plain
    tensors on the CPU, as made by a constructor that never thought of a device."""

    def __init__(self, num_fields: int, num_rows: int, width: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.table = nn.Embedding(num_fields * num_rows, width)
        self.dense = nn.Sequential(nn.Linear(13, 256), nn.ReLU(), nn.Linear(256, width), nn.ReLU())
        self.pairs = torch.triu_indices(num_fields + 1, num_fields + 1, 1)
        self.temperature = torch.tensor(0.7)
        self.top = nn.Sequential(nn.Linear(width + self.pairs.shape[1], 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        offsets = torch.arange(sparse.shape[1], device=sparse.device) * self.num_rows
        x = self.dense(dense)
        features = torch.cat((x[:, None], self.table(sparse + offsets)), 1)
        products = torch.bmm(features, features.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat((x, products), 1)) / self.temperature


def _on_device(model: Any) -> nn.Module:
    model = copy.copy(model)
    device = next(model.parameters()).device
    model.pairs, model.temperature = model.pairs.to(device), model.temperature.to(device)
    return model


def recommender(device: torch.device, tiny: bool) -> Workload:
    """A CPU scalar and a CPU index tensor that belong to the model."""
    fields, rows = 26, 100 if tiny else 10_000

    def ring(g: torch.Generator) -> list[Args]:
        return [(normal(g, 256, 13), integers(g, rows, 256, fields)) for _ in range(4)]

    return Workload(ring, ready(Recommender(fields, rows, 64), device), by_hand=_on_device)


class Selector(nn.Module):
    """Reads chosen columns, scaled: both come from the CPU with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))

    def forward(self, x: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.layers(x[:, columns] * scale)


def recommender_inputs(device: torch.device, tiny: bool) -> Workload:
    """A CPU scalar and a CPU index tensor that are arguments and change with every call."""

    def ring(g: torch.Generator) -> list[Args]:
        return [(normal(g, 256, 512), integers(g, 512, 64).cpu(), normal(g, 1)[0].cpu() + 2) for _ in range(4)]

    return Workload(ring, ready(Selector(), device))


class Wide(nn.Module):
    """Column means of a large input, then a small MLP: reading the input once is most of the work."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.ReLU())]
        self.layers = nn.Sequential(nn.Linear(width, 256), *layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.mean(0, keepdim=True) * x.shape[0] ** 0.5)


def _large(device: torch.device, tiny: bool, num_inputs: int) -> Workload:
    rows, width = (64, 256) if tiny else (8192, 16384)

    def ring(g: torch.Generator) -> list[Args]:
        return [(normal(g, rows, width),) for _ in range(num_inputs)]

    # The input that stays where it is, is captured where it is, by hand too.
    return Workload(ring, ready(Wide(width), device), in_place=(0,) if num_inputs == 1 else ())


def large_input(device: torch.device, tiny: bool) -> Workload:
    """512 MB (2^29 bytes) at another address in every call."""
    return _large(device, tiny, 3)


def large_fixed(device: torch.device, tiny: bool) -> Workload:
    """512 MB (2^29 bytes) at one address, filled in place."""
    return _large(device, tiny, 1)


class Block(nn.Module):
    """A transformer block. normalize: LayerNorm before (as GPT) or after (as BERT) each half."""

    def __init__(self, width: int, heads: int, inner: int, normalize: str) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads, self.before = heads, normalize == "before"

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def attend(self, x: torch.Tensor, mask: torch.Tensor | None, cache: Any = None, position: Any = None) -> torch.Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        if cache is not None:
            k, v = cache[0].index_copy_(2, position, k), cache[1].index_copy_(2, position, v)
        return self.output(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, cache: Any = None, position: Any = None) -> torch.Tensor:
        if self.before:
            x = x + self.attend(self.first_norm(x), mask, cache, position)
            return x + self.down(F.gelu(self.up(self.second_norm(x))))
        x = self.first_norm(x + self.attend(x, mask, cache, position))
        return self.second_norm(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, "before") for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        # Padding is nobody's answer.
        return x * mask[..., None]


def dynamic_lengths(device: torch.device, tiny: bool) -> Workload:
    """Twelve lengths, in an order that repeats no pattern of growth; batch 4, each row with a length of its own below them."""
    lengths = [33, 250, 64, 480, 111, 47, 384, 90, 200, 128, 300, 160]
    lengths = [n // 8 for n in lengths] if tiny else lengths
    width, layers = (64, 2) if tiny else (256, 6)

    def ring(g: torch.Generator) -> list[Args]:
        calls: list[Args] = []
        for length in lengths:
            real = integers(g, length // 2, 4, 1) + length // 2 + 1
            calls.append((normal(g, 4, length, width), torch.arange(length, device=g.device) < real))
        return calls

    dims = "graph.dynamic_dims=['x:1','mask:1']"
    largest = f"graph.bucketing.max_size={max(lengths)}"
    extra = {
        "hardware_aware": [dims, largest, "graph.bucketing.strategy=hardware_aware"],
        "memory_optimal": [dims, largest, "graph.bucketing.strategy=memory_optimal", "graph.bucketing.fit_after=24"],
    }
    return Workload(ring, ready(Encoder(layers, width, 4), device), dynamic=True, tolerance=2e-3, extra=extra)


def matmul_chain(device: torch.device, tiny: bool) -> Workload:
    """Eight matmuls of 4096 x 4096 x 4096 in bf16: the device is busy, and launches cost nothing."""
    width = 64 if tiny else 4096
    layers = [nn.Linear(width, width, bias=False) for _ in range(8)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=width**-0.5)

    def ring(g: torch.Generator) -> list[Args]:
        return [(normal(g, width, width, dtype=torch.bfloat16),) for _ in range(3)]

    return Workload(ring, ready(nn.Sequential(*layers), device, torch.bfloat16), tolerance=3e-2)


class Decoder(nn.Module):
    """One token over a static cache that is an argument and is written in place."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, "before") for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor, position: torch.Tensor, caches: list[list[torch.Tensor]]) -> torch.Tensor:
        x = self.embed(ids)
        mask = torch.arange(caches[0][0].shape[2], device=ids.device) <= position
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, mask[None, None, None, :], cache, position)
        return self.head(self.norm(x))


def decode(device: torch.device, tiny: bool) -> Workload:
    """A KV-cache decode step: batch 1, 1,024 positions, bf16; ids and position are new tensors, the cache stays."""
    layers, width, heads, size = (2, 64, 2, 32) if tiny else (8, 1024, 16, 1024)

    def ring(g: torch.Generator) -> list[Args]:
        shape = (1, heads, size, width // heads)
        caches = [[normal(g, *shape, dtype=torch.bfloat16) for _ in range(2)] for _ in range(layers)]
        return [(integers(g, 1000, 1, 1), torch.tensor([size // 2 + i], device=g.device), caches) for i in range(4)]

    model = ready(Decoder(layers, width, heads, 1000), device, torch.bfloat16)
    return Workload(ring, model, in_place=(2,), mutates=(2,), tolerance=3e-2)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.first_norm, self.second_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.second_norm(self.second(F.relu(self.first_norm(self.first(x))))))


def cnn_step(device: torch.device, tiny: bool) -> Workload:
    """Forward, backward and a fused AdamW step of a residual CNN on 32 images of 32 x 32, float32."""
    channels, side = (8, 8) if tiny else (32, 32)

    def make() -> nn.Module:
        torch.manual_seed(0)
        stem = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), Residual(channels), nn.MaxPool2d(2), Residual(channels), nn.MaxPool2d(2)]
        return nn.Sequential(*stem, Residual(channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)).to(device).train()

    def ring(g: torch.Generator) -> list[Args]:
        return [(normal(g, 32, 3, side, side), integers(g, 10, 32)) for _ in range(4)]

    def loss(model: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    return Workload(ring, train_model=make, loss=loss, tolerance=2e-3)


class PlainBert(nn.Module):
    """BERT-base's encoder (arXiv:1810.04805) in plain torch."""

    def __init__(self, layers: int, width: int, heads: int, inner: int, vocabulary: int = 30522) -> None:
        super().__init__()
        self.words, self.positions, self.types = nn.Embedding(vocabulary, width), nn.Embedding(512, width), nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(Block(width, heads, inner, "after") for _ in range(layers))
        self.pooler = nn.Linear(width, width)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else None

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.positions(positions) + self.types.weight[0])
        for block in self.blocks:
            x = block(x, None)
        return x, torch.tanh(self.pooler(x[:, 0]))


class HuggingFaceBert(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, inner: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "intermediate_size": inner}
        self.bert = BertModel(BertConfig(**sizes, attn_implementation="sdpa"))

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.bert(input_ids=input_ids)
        return output.last_hidden_state, output.pooler_output


def bert(device: torch.device, tiny: bool) -> Workload:
    """BERT-base, batch 1 x 128, bf16: transformers' where it is installed, else the same architecture in plain torch."""
    sizes = (2, 64, 2, 128) if tiny else (12, 768, 12, 3072)
    torch.manual_seed(0)
    try:
        model, source = HuggingFaceBert(*sizes), "transformers"
    except ImportError:
        model, source = PlainBert(*sizes), "plain torch"
    return _bert(model, source, device)


def bert_plain(device: torch.device, tiny: bool) -> Workload:
    """BERT-base, batch 1 x 128, bf16, in plain torch."""
    torch.manual_seed(0)
    return _bert(PlainBert(*((2, 64, 2, 128) if tiny else (12, 768, 12, 3072))), "plain torch", device)


def _bert(model: nn.Module, source: str, device: torch.device) -> Workload:
    def ring(g: torch.Generator) -> list[Args]:
        return [(integers(g, 30522, 1, 128),) for _ in range(4)]

    extra = {"fused qkv": ["fusion=qkv"]}
    return Workload(ring, ready(model, device, torch.bfloat16), tolerance=4e-2, extra=extra, notes={"source": source})


WORKLOADS: dict[str, Callable[[torch.device, bool], Workload]] = {
    "mlp": mlp,
    "gru": gru,
    "gru_loop": gru_loop,
    "recommender": recommender,
    "recommender_inputs": recommender_inputs,
    "large_input": large_input,
    "large_fixed": large_fixed,
    "dynamic_lengths": dynamic_lengths,
    "matmul_chain": matmul_chain,
    "decode": decode,
    "cnn_step": cnn_step,
    "bert": bert,
    "bert_plain": bert_plain,
}
