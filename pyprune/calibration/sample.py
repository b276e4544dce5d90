"""What the backward pass shows of one matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sample:
    """What one matrix read and what came back to it, for N whole sequences of equal length.

    x: inputs `[N, T, C]`; g: gradients of the outputs `[N, T, R]`, in the same dtype. Real tokens
        only. For an expert T counts the tokens routed to it and N is 1.
    targets: tokens that each of these sequences predicts: real ones that follow a real one. The
        loss is summed over them, so `g / targets` belongs to the mean loss of a sequence.
    leader: name of the first matrix that read this same tensor x (the matrix's own name if it is
        the first): with q, k and v a statistic of x alone needs to be kept for the leader only.
    draw: which draw of labels the gradients belong to, see `fisher_samples` of `backward_pass`;
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
        return 0 if self.draw else self.x.shape[0] * self.x.shape[1]
