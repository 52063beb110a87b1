"""New words: a token and one learnable row of the embedding table for each instance."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AddedToken, CLIPTokenizer, PreTrainedModel

from mifo.backbones.clip import END_OF_WORD
from mifo.errors import MifoError

# of the table's standard deviation, as transformers has it, which makes new rows in the published code
NOISE = 3e-5


class NewTokenRows(nn.Module):
    """A frozen token embedding table and N new rows after it (Textual Inversion, arXiv 2208.01618).

    The old rows can not change, since only `rows` is a parameter that learns.

    Attributes:
        table: the embedding of the base model, frozen.
        rows: (N, width) float32, whatever the dtype of the table.
        tokens: the N new words; word i has the id `first_id + i`.
    """

    rounds_itself = True  # rows keep 32 bits, also where a pass reads rounded copies of all other weights

    def __init__(self, table: nn.Embedding, rows: Tensor, tokens: Sequence[str], first_id: int) -> None:
        super().__init__()
        self.table = table.requires_grad_(False)
        self.rows = nn.Parameter(rows)
        self.tokens = tuple(tokens)
        self.first_id = first_id

    def forward(self, ids: Tensor) -> Tensor:
        """Embed `ids` (B, L) as (B, L, width)."""
        known = self.table(ids.clamp(max=self.table.num_embeddings - 1))
        new = self.rows[(ids - self.first_id).clamp(min=0)].to(known.dtype)
        return torch.where((ids >= self.first_id)[..., None], new, known)


def add_rows(
    tokenizer: CLIPTokenizer,
    text_encoder: PreTrainedModel,
    tokens: Sequence[str],
    initializers: Sequence[str | None],
    generator: torch.Generator,
) -> None:
    """Teach a tokenizer and its text encoder, in place, new words; see `DiffusionModel.add_words`.

    Raises:
        MifoError: a word is known already, the encoder has new words already, or an initializer is empty.
    """
    vocabulary = tokenizer.get_vocab()
    if clashes := [token for token in tokens if token in vocabulary]:
        raise MifoError(
            f"the model already has the word {clashes[0]}; take a base model without learned words, or "
            "export its words by other names, as words=[mycat]."
        )
    table = text_encoder.get_input_embeddings()
    if isinstance(table, NewTokenRows):
        raise MifoError(
            f"the model already carries {', '.join(table.tokens)}; load the base model anew first."
        )
    initial = _initial_rows(tokenizer, table.weight, initializers, generator)
    extend(tokenizer, tokens)
    first_id = tokenizer.convert_tokens_to_ids(tokens[0])
    text_encoder.set_input_embeddings(NewTokenRows(table, initial, tokens, first_id))


def is_known(tokenizer: CLIPTokenizer, word: str) -> bool:
    """Whether the tokenizer's table has the word: as it stands, or as CLIP or Qwen spell it."""
    return bool({word, word.lower() + END_OF_WORD, f"Ġ{word}"} & {*tokenizer.get_vocab()})


def extend(tokenizer: CLIPTokenizer, tokens: Sequence[str]) -> None:
    """Teach the tokenizer alone, in place, one new word per instance."""
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])


def _initial_rows(
    tokenizer: CLIPTokenizer, table: Tensor, initializers: Sequence[str | None], generator: torch.Generator
) -> Tensor:
    table = table.detach().float()
    noise = torch.randn(len(initializers), table.shape[1], generator=generator).to(table.device)
    rows = table.mean(0) + NOISE * table.std(0) * noise
    for row, word in zip(rows, initializers, strict=True):
        if word is None:
            continue
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if not ids:
            raise MifoError(f"the initializer {word!r} holds no word; name a word such as 'car', or null.")
        row.copy_(table[ids].mean(0))
    return rows
