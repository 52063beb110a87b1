"""Instances that were learned apart, put into one picture, where the weights of each act in its boxes alone.

All words are known everywhere. A pass is made with the base model's weights and with those of each result;
inside the shapes of a result's instances its prediction and its attention count, elsewhere the base model's.

Letters: B samples, L tokens, n pixels of a site.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mifo.backbones.imported import merge_adapters
from mifo.backbones.learned import Learned, load_learned, read_learned
from mifo.backbones.model import DiffusionModel
from mifo.errors import MifoError
from mifo.method.backbone import Conditioning, Read, Rules, Site
from mifo.method.prompts.instances import INSTANCE, instance_tokens
from mifo.method.regions.grids import resize_shapes
from mifo.method.regions.rules import MOST_SUBJECTS

_OWNERS = "owners"  # a part of the conditioning: the member whose word a token is, (B, L)


def joined_tokens(results: Sequence[Learned]) -> list[str]:
    """The words of several results in one prompt: those of the first keep their numbers, others follow."""
    return instance_tokens(sum(len(each.tokens) for each in results))


@torch.no_grad()
def put_together(base: DiffusionModel, folders: Sequence[Path]) -> Any:
    """The base model with the words of all results, and a member for each result whose weights learned.

    `base` is changed in place; each member is a copy of it, but for the autoencoder, which all share.

    Raises:
        MifoError: as `load_learned`.
    """
    results = [read_learned(folder) for folder in folders]
    tokens = joined_tokens(results)
    base.add_words(tokens)
    members, owners = [base], list[int]()
    for folder, result in zip(folders, results, strict=True):
        own = base
        if result.trainable != "tokens":
            own = copy.deepcopy(base, {id(base.autoencoder): base.autoencoder})
            members.append(own)
        load_learned(folder, own, len(owners))
        merge_adapters(own.networks)
        for name, rows in base.new_rows.items():
            rows[len(owners) :] = own.new_rows[name][len(owners) :]
        owners += [0 if own is base else len(members) - 1] * len(result.tokens)
    for member in members:
        for name, rows in member.new_rows.items():
            rows.copy_(base.new_rows[name])
        member.freeze()
    return Together(members, dict(zip(tokens, owners, strict=True))) if len(members) > 1 else base


class Together:
    """A `Backbone` of several members, of which the first counts wherever no other member's instance is.

    Whatever is not said here is the first member's.

    Attributes:
        members: models of one family that know the same words.
        owners: the number of the member that a word belongs to, by the word.
    """

    def __init__(self, members: Sequence[DiffusionModel], owners: Mapping[str, int]) -> None:
        self.members, self.owners = members, owners

    def __getattr__(self, name: str) -> Any:
        return getattr(self.members[0], name)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The parts of every member, under its number, and the owner of each token."""
        parts = {
            f"{number}.{name}": part
            for number, member in enumerate(self.members)
            for name, part in self._encoded(number, member, prompts).items()
        }
        ids = self.members[0].tokenize(prompts)
        owners = torch.zeros(len(prompts), ids.shape[-1])
        for word, owner in self.owners.items():
            for row, own in enumerate(ids):
                owners[row, self.members[0].places(own, word)] = owner
        return Conditioning({**parts, _OWNERS: owners.to(self.members[0].device)})

    def _encoded(self, number: int, member: DiffusionModel, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What a member makes of prompts in which its own words come before all other instances' words.

        A text encoder reads a word in the light of those before it, and the member's words never followed
        words of others while they were learned. The states of the words return to the words' places.
        """
        own = {word for word, owner in self.owners.items() if owner == number}
        texts, orders = zip(*[_first(own, prompt) for prompt in prompts], strict=True)
        found = member.encode_prompts(texts).parts
        for row, (prompt, text, order) in enumerate(zip(prompts, texts, orders, strict=True)):
            here, there = (
                [list(places) for word, places in member.words(each).words if word in self.owners]
                for each in (prompt, text)
            )
            for part in found.values():
                if part.ndim == 3:  # (B, tokens, width)
                    states = part[row].clone()
                    for place, i in zip(there, order, strict=True):
                        part[row, here[i]] = states[place]
        return found

    def predict(
        self,
        noisy: Tensor,
        time: Tensor,
        conditioning: Conditioning,
        reads: Mapping[Site, Read] | None = None,
        rules: Rules | None = None,
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        """See `Backbone.predict`; `rules` say where the instances are, and must be given."""
        whole = dict.fromkeys(reads or (), _unchanged) or None
        passes = [
            member.predict(noisy, time, own, whole, rules)
            for member, own in zip(self.members, self._parts(conditioning), strict=True)
        ]
        weights = self._weights(conditioning, rules, (noisy.shape[-2], noisy.shape[-1]))
        shared = [
            weight.unflatten(1, noisy.shape[-2:])[:, None].to(each) * each
            for weight, (each, _) in zip(weights, passes, strict=True)
        ]
        prediction = torch.stack(shared).sum(0)
        return prediction, self._read([kept for _, kept in passes], conditioning, reads or {}, rules)

    def maps(
        self,
        noisy: Tensor,
        time: Tensor,
        conditioning: Conditioning,
        reads: Mapping[Site, Read],
        rules: Rules | None = None,
    ) -> dict[Site, Tensor]:
        """See `Backbone.maps`."""
        kept = [
            member.maps(noisy, time, own, dict.fromkeys(reads, _unchanged), rules)
            for member, own in zip(self.members, self._parts(conditioning), strict=True)
        ]
        return self._read(kept, conditioning, reads, rules)

    def _parts(self, conditioning: Conditioning) -> list[Conditioning]:
        """What each member made of the prompts."""
        return [
            Conditioning(
                {
                    name.partition(".")[2]: part
                    for name, part in conditioning.parts.items()
                    if name.startswith(f"{number}.")
                }
            )
            for number in range(len(self.members))
        ]

    def _read(
        self,
        kept: Sequence[Mapping[Site, Tensor]],
        conditioning: Conditioning,
        reads: Mapping[Site, Read],
        rules: Rules | None,
    ) -> dict[Site, Tensor]:
        """What the reads keep of attention in which a pixel attends as the member that counts there does."""
        found = {}
        for site, read in reads.items():
            weights = self._weights(conditioning, rules, site.size)
            shared = [
                weight[:, None, :, None] * each[site] for weight, each in zip(weights, kept, strict=True)
            ]
            found[site] = read(torch.stack(shared).sum(0))
        return found

    def _weights(
        self, conditioning: Conditioning, rules: Rules | None, size: tuple[int, int]
    ) -> list[Tensor]:
        """How much each member counts at each pixel, (B or 1, n); they sum to one.

        A rule's words have the bit of their subject, and so have the subject's pixels.
        """
        if rules is None:
            raise MifoError(
                "instances that were learned apart need masked attention and a box each; take "
                "guidance=mifo, and give each instance of the prompt a box."
            )
        finest = size if size in rules.pixels else max(rules.pixels)
        pixels, words = rules.pixels[finest].keys, rules.words[finest].keys[0]
        places = torch.arange(MOST_SUBJECTS, device=words.device)
        bits = (words[:, None] >> places) & 1  # (L, subjects)
        owners = conditioning.parts[_OWNERS][-1]  # the prompt's; an unconditional half comes first
        told = min(len(bits), len(owners))  # one may be padded beyond the other, with words of nobody
        bits, owners = bits[:told], owners[:told]
        inside = []
        for number in range(1, len(self.members)):
            own = (bits * (owners == number)[:, None]).amax(0)
            mask = ((pixels[..., None] >> places) & own).amax(-1).bool()  # (B, n)
            if finest != size:
                mask = resize_shapes(mask.unflatten(1, finest)[:, None], size[0]).flatten(1)
            inside.append(mask.float())
        shared = torch.stack(inside).sum(0)
        return [(shared == 0).float(), *(each / shared.clamp_min(1) for each in inside)]


def _unchanged(probabilities: Tensor) -> Tensor:
    return probabilities


def _first(own: Collection[str], prompt: str) -> tuple[str, list[int]]:
    """A prompt in which `own` instances' words stand before all others', and where each word stood before."""
    words = INSTANCE.findall(prompt)
    order = sorted(range(len(words)), key=lambda i: words[i] not in own)
    put = iter(order)
    return INSTANCE.sub(lambda _: words[next(put)], prompt), order
