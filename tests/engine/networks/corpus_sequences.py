"""Networks on sequences: attention, recurrence, and code with loops."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS = 200


class Attention(nn.Module):
    """Multi-head attention with one fused projection of queries, keys and values."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.heads = heads
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.in_proj(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=self.causal)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Normalised before attention and before the two-layer network."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Token classes from a small encoder of our own blocks."""

    def __init__(self, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.position = nn.Parameter(torch.randn(1, 32, width) * 0.1)
        self.blocks = nn.ModuleList([Block(width, 4, causal=False) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[:, : tokens.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class TorchEncoder(nn.Module):
    """PyTorch's own encoder; its `in_proj_weight` is a bare parameter."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        layer = nn.TransformerEncoderLayer(width, 4, 128, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


class Gpt(nn.Module):
    """A decoder whose output layer is its table of words."""

    def __init__(self, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.wte = nn.Embedding(WORDS, width)
        self.wpe = nn.Embedding(32, width)
        self.blocks = nn.ModuleList([Block(width, 4, causal=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, WORDS, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.size(1), device=tokens.device)
        x = self.wte(tokens) + self.wpe(places)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


class Vit(nn.Module):
    """Patches by a strided convolution, a class token, learned positions."""

    def __init__(self, width: int = 48, depth: int = 2, patch: int = 4, side: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 1 + (side // patch) ** 2, width) * 0.1)
        self.blocks = nn.Sequential(*[Block(width, 4, causal=False) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.size(0), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class LstmTagger(nn.Module):
    """A tag for each word from a bidirectional LSTM of two layers."""

    def __init__(self, width: int = 32, hidden: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.rnn = nn.LSTM(width, hidden, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(2 * hidden, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.rnn(self.embedding(tokens))
        return self.head(states)


class GruTagger(nn.Module):
    """The same with a GRU, one layer in one direction."""

    def __init__(self, width: int = 48, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.rnn = nn.GRU(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


class CellLoop(nn.Module):
    """A recurrent cell that the network's own loop calls, once for each step of the sequence."""

    def __init__(self, width: int = 24, hidden: int = 96) -> None:
        super().__init__()
        self.cell = nn.GRUCell(width, hidden)
        self.head = nn.Linear(hidden, 4)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.size(0), self.hidden, dtype=x.dtype, device=x.device)
        for step in range(x.size(1)):
            state = self.cell(x[:, step], state)
        return self.head(state)


class LoopWithBranch(nn.Module):
    """A layer that runs until its output is small, another in one arm of a branch."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.enter = nn.Linear(20, width)
        self.step = nn.Linear(width, width)
        self.extra = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x))
        rounds = 0
        while rounds < 3:
            x = x + torch.tanh(self.step(x))
            rounds += 1
        if x.size(1) > 10:
            y = self.extra(x)
            x = x + y
        else:
            x = x * 2.0
        return self.head(x)


class Addmm(nn.Module):
    """Weights that `addmm`, `matmul`, `mm` and `F.linear` use, and that belong to no layer."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(40, width) * 0.2)
        self.b1 = nn.Parameter(torch.zeros(width))
        self.w2 = nn.Parameter(torch.randn(width, width) * 0.1)
        self.w3 = nn.Parameter(torch.randn(width, width) * 0.1)
        self.w4 = nn.Parameter(torch.randn(width, width) * 0.1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.addmm(self.b1, x, self.w1))
        x = torch.relu(x @ self.w2)
        x = torch.relu(torch.mm(x, self.w3.t()))
        return self.head(torch.relu(F.linear(x, self.w4)))


class TwoTowers(nn.Module):
    """Two inputs of different kinds, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(nn.Conv2d(1, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.ReLU())
        self.words = nn.Embedding(WORDS, 48)
        self.join = nn.Linear(96, 128)
        self.score = nn.Linear(128, 1)
        self.topic = nn.Linear(128, 5)

    def forward(self, picture: Tensor, words: Tensor) -> dict[str, Tensor]:
        seen, read = self.picture(picture).mean((2, 3)), self.words(words).mean(1)
        x = F.relu(self.join(torch.cat([seen, read], 1)))
        return {"topic": self.topic(x), "score": self.score(x)}


class Exported(nn.Module):
    """Several exported methods, attributes that are no tensors, a buffer that forward updates, a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(24, 128)
        self.norm = nn.BatchNorm1d(128)
        self.middle = nn.Linear(128, 128)
        self.head = nn.Linear(128, 4)
        self.aside = nn.Linear(128, 8)
        self.labels = ["red", "green", "blue", "none"]
        self.scale = 0.5
        self.sizes = (24, 128)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1.0)
        return self.head(self.features(x)) * self.scale

    @torch.jit.export
    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.middle(F.relu(self.norm(self.enter(x)))))

    @torch.jit.export
    def embed(self, x: Tensor) -> Tensor:
        return self.aside(self.features(x))

    @torch.jit.export
    def label(self, index: int) -> str:
        return self.labels[index]


class Normalised(nn.Module):
    """Weights that are computed from a direction and a length, a table that sums its rows, outputs in nested tuples."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(WORDS, width, mode="sum")
        self.direction = nn.Parameter(torch.randn(2 * width, width))
        self.length = nn.Parameter(torch.ones(2 * width, 1))
        self.bias = nn.Parameter(torch.zeros(2 * width))
        self.head = nn.Linear(2 * width, 6)

    def forward(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        weight = self.direction * (self.length / self.direction.norm(2, 1, keepdim=True))
        y = self.head(torch.tanh(F.linear(self.bag(tokens), weight, self.bias)))
        return y, (y.softmax(1), y.argmax(1))
