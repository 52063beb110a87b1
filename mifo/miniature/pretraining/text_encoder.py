"""The miniature's CLIPTextModel, first taught on text alone to bind each thing to its own words.

At every thing's token the hidden state must tell the colour and the pattern that the prompt gives to *that*
thing, and at the end of the text which things and which background were named. So the denoiser starts from a
language that is already sorted, and spends its steps on pictures.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from mifo.miniature.pretraining.corpus import Corpus
from mifo.miniature.pretraining.settings import PretrainSettings
from mifo.miniature.pretraining.training import Pretraining
from mifo.miniature.tokenizer import MAX_LENGTH
from mifo.world.vocabulary import BACKGROUNDS, COLOURS, PATTERNS, THINGS

WIDTH = 192


def build_text_encoder(tokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=6,
            max_position_embeddings=MAX_LENGTH,
            hidden_act="gelu",
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _ids(tokenizer, options) -> Tensor:
    return torch.tensor([tokenizer(word).input_ids[1] for word in options])


def _which(ids: Tensor, options: Tensor) -> Tensor:
    """Index of each id among ``options``, or len(options) where it is none of them."""
    hits = ids.unsqueeze(-1) == options
    return torch.where(hits.any(-1), hits.float().argmax(-1), len(options))


class Reader(nn.Module):
    """The text encoder and the linear heads that read words back from its hidden states."""

    def __init__(self, tokenizer) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.colour = nn.Linear(WIDTH, len(COLOURS) + 1)
        self.pattern = nn.Linear(WIDTH, len(PATTERNS) + 1)
        self.thing = nn.Linear(WIDTH, len(THINGS))
        self.background = nn.Linear(WIDTH, len(BACKGROUNDS) + 1)


class TextEncoderPretraining(Pretraining):
    """Cross-entropy of the words read back at each thing's token and at the end of the text."""

    part = "text_encoder"

    def __init__(self, corpus: Corpus, tokenizer, settings: PretrainSettings) -> None:
        super().__init__(Reader(tokenizer), settings.text_encoder, settings.seed)
        self.corpus = corpus
        self.eos = tokenizer.eos_token_id
        self.register_buffer("things", _ids(tokenizer, THINGS), persistent=False)
        self.register_buffer("colours", _ids(tokenizer, COLOURS), persistent=False)
        self.register_buffer("patterns", _ids(tokenizer, PATTERNS), persistent=False)
        # One word tells each background: its last noun ("fabric", "beach", …) or, for the endings that share
        # their last word, the noun that differs.
        telling = "beach jungle snow street fabric floor city mountain eiffel water".split()
        self.register_buffer("endings", _ids(tokenizer, telling), persistent=False)

    def loss(self, generator: torch.Generator) -> dict[str, Tensor]:
        device = self.device
        ids = self.corpus.captions[self.corpus.pick(self.settings.batch_size, generator)]
        hidden = self.network.text_encoder(ids).last_hidden_state
        thing = _which(ids, self.things)
        row, position = torch.nonzero(thing < len(THINGS), as_tuple=True)
        before, earlier = ids[row, position - 1], ids[row, position - 2]
        pattern = _which(before, self.patterns)
        named = pattern < len(PATTERNS)
        colour = _which(torch.where(named, earlier, before), self.colours)
        at_thing = hidden[row, position]
        binding = F.cross_entropy(self.network.colour(at_thing), colour)
        binding = binding + F.cross_entropy(self.network.pattern(at_thing), pattern)
        binding = binding + F.cross_entropy(self.network.thing(at_thing), thing[row, position])
        end = hidden[torch.arange(len(ids), device=device), (ids == self.eos).int().argmax(1)]
        present = torch.zeros(len(ids), len(THINGS), device=device)
        present[row, thing[row, position]] = 1.0
        ending = _which(ids, self.endings).amin(1)
        summary = F.binary_cross_entropy_with_logits(self.network.thing(end), present)
        summary = summary + F.cross_entropy(self.network.background(end), ending)
        return {"loss": binding + summary, "binding": binding, "summary": summary}
