"""Where a part of a random model is drawn."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """What a part must know of what is before and around it.

    Attributes:
        shape: that of `x`, without the axis of examples.
        keep: only the last axis may change.
        complex: x is complex.
        lanes: the layers share their statistics with those of other lanes.
        depth: how many blocks it lies in.
        inside: nothing may look at the axis of examples, which is another one, or mapped.
    """

    shape: tuple
    keep: bool = False
    complex: bool = False
    lanes: bool = False
    depth: int = 0
    inside: bool = False

    @property
    def rank(self):
        return len(self.shape) + (not self.inside)

    @property
    def features(self):
        return self.shape[-1]
