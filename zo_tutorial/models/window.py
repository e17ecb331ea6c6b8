"""A tagger that sees a few words at a time: what an encoder has to beat (chapter 11)."""

from torch import Generator, Tensor, nn
from torch.nn.functional import pad

from zo_tutorial.models.encoder import PADDING


class Window(nn.Module):
    """The tag of a word from the vectors of the words around it, the intent from the mean of all words; no attention.

    The word vectors stay as they are drawn. Padding, and what lies outside of the sentence, is zero. Both heads are one
    linear layer, or two with GELU between them; the last layer starts at zero.

    Args:
        words, intents, slots: how many tokens, intent classes and slot tags there are.
        width: length of a word vector.
        reach: how many neighbours on each side a tag sees.
        hidden: hidden units of each head; 0: its layer is linear.
        generator: where the word vectors are drawn from; None: torch's global generator.
    """

    def __init__(
        self, words: int, intents: int, slots: int, width: int = 128, reach: int = 2, hidden: int = 0,
        *, generator: Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        self.reach = reach
        self.words = nn.utils.skip_init(nn.Embedding, words, width)
        nn.init.normal_(self.words.weight, generator=generator)
        self.words.requires_grad_(False)

        def head(n: int, m: int) -> nn.Module:
            last = nn.utils.skip_init(nn.Linear, hidden or n, m)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            if not hidden:
                return last
            first = nn.utils.skip_init(nn.Linear, n, hidden)
            nn.init.xavier_uniform_(first.weight, generator=generator)
            nn.init.zeros_(first.bias)
            return nn.Sequential(first, nn.GELU(), last)

        self.intent, self.slots = head(width, intents), head((2 * reach + 1) * width, slots)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the intent (B, intents) and of the tags (B, L, slots) for tokens (B, L)."""
        there = (tokens != PADDING)[..., None]  # (B, L, 1)
        x = self.words(tokens) * there  # (B, L, width)
        near = pad(x, (0, 0, self.reach, self.reach)).unfold(1, 2 * self.reach + 1, 1)  # (B, L, width, 2 reach + 1)
        return self.intent(x.sum(1) / there.sum(1).clamp(min=1)), self.slots(near.flatten(2))
