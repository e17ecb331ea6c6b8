"""A transformer encoder that classifies the intent of a sentence and tags the slots of its words (chapter 11)."""

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Generator, Tensor, nn

PADDING = 0  # the token that fills a sentence up


class Encoder(nn.Module):
    """Embeddings, post-layer-norm encoder blocks, an intent head on the first token, and a slot head on every token.

    The blocks are those of `torch.nn.TransformerEncoderLayer` (Vaswani et al., 2017), with every linear layer a module
    of its own, so that each may be dense, TT or TTM, and the attention written out, so that `torch.func` sees it. With
    words=800, d_model=768, heads=12, d_hidden=3072, positions=512 and two segments the dense net has 16,479,119
    parameters.

    Args:
        words, intents, slots: how many tokens, intent classes and slot tags there are.
        d_model: width, a multiple of `heads`.
        heads: attention heads.
        d_hidden: width between the two layers of the feed-forward part.
        layers: encoder blocks.
        positions: the longest sentence.
        segments: kinds of sentence parts.
        dropout: of embeddings, attention weights, and the output of every part of a block.
        focus: (offset, slope) of each head: where it looks before it has learned anything. From its score for the
            token at j, seen from i, slope times the distance of j from i + offset is taken away (Press et al., 2022,
            have offset 0). None: nothing is.
        position_scale: standard deviation of the position and segment embeddings at the start; that of words is 1.
        branch_scale: the last layer of attention and of feed-forward part starts with weights so many times as large:
            with a small one, a block hardly changes what it is given.
        linear: makes the linear layers: linear(in_features, out_features). None: dense. The last layer of each head,
            which has as many outputs as there are classes, is always dense.
        embedding: makes the token embedding: embedding(words, d_model). None: dense.
        generator: where dense weights are drawn from; None: torch's global generator.

    Raises:
        ValueError: `d_model` is no multiple of `heads`; not a focus for each head.
    """

    def __init__(
        self,
        words: int,
        intents: int,
        slots: int,
        d_model: int = 64,
        heads: int = 4,
        d_hidden: int = 128,
        layers: int = 2,
        positions: int = 64,
        segments: int = 2,
        dropout: float = 0.0,
        focus: Sequence[tuple[float, float]] | None = None,
        position_scale: float = 1.0,
        branch_scale: float = 1.0,
        linear: Callable[[int, int], nn.Module] | None = None,
        embedding: Callable[[int, int], nn.Module] | None = None,
        *,
        generator: Generator | None = None,
    ):
        super().__init__()
        if d_model % heads:
            raise ValueError(f"d_model = {d_model} is no multiple of heads = {heads}")
        if focus is not None and len(focus) != heads:
            raise ValueError(f"focus has {len(focus)} pairs of offset and slope for {heads} heads")

        def dense(n: int, m: int) -> nn.Linear:
            layer = nn.utils.skip_init(nn.Linear, n, m)
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
            return layer

        def table(rows: int, width: int, std: float = 1.0) -> nn.Embedding:
            layer = nn.utils.skip_init(nn.Embedding, rows, width)
            nn.init.normal_(layer.weight, std=std, generator=generator)
            return layer

        linear = linear or dense
        self.words = (embedding or table)(words, d_model)
        self.positions = table(positions, d_model, position_scale)
        self.segments = table(segments, d_model, position_scale)
        self.focus = focus and tuple((offset, slope) for offset, slope in focus)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        blocks = [Block(d_model, heads, d_hidden, dropout, linear) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.intent = nn.Sequential(linear(d_model, d_model), nn.Tanh(), dense(d_model, intents))
        self.slots = nn.Sequential(linear(d_model, d_model), nn.GELU(), nn.LayerNorm(d_model), dense(d_model, slots))
        for block in blocks:
            _scale(block.output, branch_scale)
            _scale(block.down, branch_scale)

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the intent (B, intents) and of the tags (B, L, slots) for tokens (B, L).

        segments: (B, L); None: all of the first kind.
        """
        place = torch.arange(tokens.shape[1], device=tokens.device)
        segments = torch.zeros_like(tokens) if segments is None else segments
        x = self.words(tokens) + self.positions(place) + self.segments(segments)
        x = self.dropout(self.norm(x))  # (B, L, d_model)
        mask = self.mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.intent(x[:, 0]), self.slots(x)

    def mask(self, tokens: Tensor) -> Tensor:
        """What attention adds to its scores: −∞ for padding, else the focus (B, heads, L, L), or 0 (B, 1, 1, L).

        Where all is padding nothing is masked, or there would be nothing to attend to.
        """
        start = torch.zeros((), device=tokens.device, dtype=self.norm.weight.dtype)
        if self.focus is not None:
            place = torch.arange(tokens.shape[1], device=tokens.device)
            offsets, slopes = start.new_tensor(self.focus).T[:, :, None, None]  # (heads, 1, 1)
            start = -slopes * (place - place[:, None] - offsets).abs()  # (heads, L, L)
        words = tokens != PADDING  # (B, L)
        seen = words | ~words.any(1, keepdim=True)
        return torch.where(seen[:, None, None, :], start, -torch.inf)


class Block(nn.Module):
    """x <- norm(x + attention(x)), then x <- norm(x + feed-forward(x))."""

    def __init__(self, d_model: int, heads: int, d_hidden: int, dropout: float, linear: Callable):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (linear(d_model, d_model) for _ in range(4))
        self.up, self.down = linear(d_model, d_hidden), linear(d_hidden, d_model)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, d_model); mask, which is added to the scores of attention, (B, heads or 1, L or 1, L)."""
        x = self.norm1(x + self.dropout(self.output(self.attend(x, mask))))
        hidden = self.dropout(nn.functional.gelu(self.up(x)))  # (B, L, d_hidden)
        return self.norm2(x + self.dropout(self.down(hidden)))

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """softmax(Q Kᵀ / √(d_model / heads) + mask) V of each head, side by side: (B, L, d_model)."""
        value = self._by_head(self.value(x))
        return (self.dropout(self.weights(x, mask)) @ value).transpose(1, 2).flatten(2)

    def weights(self, x: Tensor, mask: Tensor) -> Tensor:
        """How much each token looks at each other: (B, heads, L, L), rows sum to 1."""
        query, key = self._by_head(self.query(x)), self._by_head(self.key(x))
        return (query @ key.transpose(2, 3) / sqrt(query.shape[-1]) + mask).softmax(-1)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, d_model / heads)


def _scale(layer: nn.Module, factor: float) -> None:
    """Multiply the weight of a dense or tensor layer, in equal parts on all of its cores."""
    weights = [parameter for name, parameter in layer.named_parameters() if name != "bias"]
    for weight in weights:
        weight.data.mul_(factor ** (1 / len(weights)))
