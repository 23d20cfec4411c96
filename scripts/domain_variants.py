"""The ways to train one network on two domains; the table is in train_domains.py."""

from typing import Literal, NamedTuple


class Variant(NamedTuple):
    """How batches are made of domains, and what the domains have to themselves."""

    mixed: bool
    separate: bool
    domain_affine: bool = False

    @property
    def training(self) -> Literal["shared", "domain"]:
        """What a batch is normalized by: a batch of one domain leaves no choice."""
        return "shared" if self.mixed and not self.separate else "domain"

    def consistent(self, test: Literal["running", "shared", "domain"]) -> bool:
        """Whether the test normalizes as training does."""
        kept = "domain" if self.separate else "shared"
        return self.training == (kept if test == "running" else test)


VARIANTS = {
    "mixed-shared": Variant(mixed=True, separate=False),
    "mixed-domain": Variant(mixed=True, separate=True),
    "mixed-domain-affine": Variant(mixed=True, separate=True, domain_affine=True),
    "turn-shared": Variant(mixed=False, separate=False),
    "turn-domain": Variant(mixed=False, separate=True),
    "turn-domain-affine": Variant(mixed=False, separate=True, domain_affine=True),
}
Name = Literal[
    "mixed-shared", "mixed-domain", "mixed-domain-affine", "turn-shared", "turn-domain", "turn-domain-affine"
]
