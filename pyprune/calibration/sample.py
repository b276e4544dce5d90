"""What the backward pass shows of one matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sample:
    """What one matrix read and what came back to it, for one whole sequence.

    x: inputs `[T, C]`; g: gradients of the outputs `[T, R]`, in the same dtype. Real tokens only,
        for an expert those routed to it.
    targets: tokens that the sequence predicts: real ones that follow a real one. The loss is summed
        over them, so `g / targets` belongs to the mean loss.
    leader: name of the first matrix that read this same tensor x (the matrix's own name if it is
        the first): with q, k and v a statistic of x alone needs to be kept for the leader only.
    draw: which draw of labels the gradients belong to, see `fisher_samples` of `PassOptions`;
        the inputs of all draws are the same.
    """

    x: Tensor
    g: Tensor
    targets: int
    leader: str
    draw: int = 0

    @property
    def new_tokens(self) -> int:
        """Tokens whose inputs no earlier draw has shown."""
        return 0 if self.draw else len(self.x)
