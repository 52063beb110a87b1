"""A transformer of joint attention, whose attention can be read and bounded."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from mifo.backbones.attention import AttentiveNetwork, Keep
from mifo.backbones.joint.attention import JointAttention, JointRules, place
from mifo.backbones.joint.sites import choose_sites
from mifo.method.backbone import Read, Rules, Site


class JointNetwork(AttentiveNetwork):
    """A family says which `sites` there are, how the network is called, and which processor a module takes.

    With `whole_row` maps hold shares of the whole row, see `JointAttention`.

    Class attributes:
        words_first: whether words come before pixels in the joint sequence.
    """

    words_first: ClassVar[bool] = False

    def __init__(self, network: Any, sites: tuple[Site, ...], whole_row: bool = False) -> None:
        super().__init__(network, sites, choose_sites(sites))
        self.whole_row = whole_row

    @abstractmethod
    def processor_of(self, module: Any) -> type[JointAttention]:
        """The class of the processor of an attention layer."""

    def processors(self, reads: Mapping[Site, Read], keep: Keep, rules: Rules | None) -> list[Any]:
        masks = JointRules(rules, self.words_first)
        return [
            self.processor_of(module)(
                {site: reads[site] for site in sites if site in reads},
                keep,
                masks.joint(sites[0].size) if len(sites) > 1 else masks.of(sites[0]),
                masks,
                sites[0].size[0] * sites[0].size[1],
                self.whole_row,
            )
            for sites, module in zip(self.layers, self._modules, strict=True)
        ]

    def queries(self, site: Site) -> slice:
        return place("pixels", site.size[0] * site.size[1], self.words_first)

    def keys(self, site: Site) -> slice:
        return place(site.kind, site.size[0] * site.size[1], self.words_first)
