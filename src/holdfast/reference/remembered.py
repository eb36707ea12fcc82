"""What the base says of every text of the run, read once before the first step.

Its last hidden states are kept: H numbers a position, from which the head makes the distribution
anew, exactly. A live base would compute them again each time a row comes by, from a second copy of
the weights where all are trained.

Shape suffixes: B rows, W positions in a row, M positions that need the base, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast import model as models
from holdfast.reference.documents import batches, by_length, hidden_of, key_of, packed

if TYPE_CHECKING:
    import torch

    from holdfast.objective import DenseBase, Head


class Remembered:
    """Reference for a run whose texts are all known beforehand.

    Args:
        hidden_MH: on the CPU, document after document, at all positions but each one's last.
        starts: where a document's begin, by `key_of`.
        head: of the base, where the tuned model lies; it does not move.
    """

    reads_rows = False

    def __init__(self, hidden_MH: torch.Tensor, starts: dict[bytes, int], head: Head) -> None:
        self.hidden_MH, self._starts, self._head = hidden_MH, starts, head

    @classmethod
    def of(cls, model: Any, rows: Iterable[Sequence[int]]) -> Remembered:
        """What the model says as it stands; rows of the same tokens are read once.

        On an accelerator in bfloat16, as training reads them.
        """
        import torch

        documents = by_length(rows)
        lengths = [len(document) - 1 for document in documents.values()]
        starts = dict(zip(documents, np.cumsum([0, *lengths]).tolist(), strict=False))
        device = models.causal_lm(model).device.type
        hidden_MH, filled = torch.empty(0), 0
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            for batch in batches(documents.values()):
                found_NH = hidden_of(model, batch)
                if not filled:
                    hidden_MH = torch.empty(sum(lengths), found_NH.shape[1], dtype=found_NH.dtype)
                hidden_MH[filled : filled + len(found_NH)] = found_NH
                filled += len(found_NH)
        return cls(hidden_MH, starts, _still(models.head(model)))

    def view(
        self, input_ids_BW: torch.Tensor, position_ids_BW: torch.Tensor, kl_BW: torch.Tensor
    ) -> DenseBase:
        """The base's hidden states at `kl_BW`, and its head.

        Raises:
            KeyError: a row is none of those that were read.
        """
        import torch

        from holdfast.objective import DenseBase

        places = [
            self._starts[key_of(ids)] + np.flatnonzero(wanted[:-1])
            for ids, wanted in packed(
                input_ids_BW.cpu().numpy(), position_ids_BW.cpu().numpy(), kl_BW.cpu().numpy()
            )
        ]
        chosen_M = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *places]))
        home = self._head.weight_VH.device
        return DenseBase(self.hidden_MH[chosen_M].to(home), self._head)


def size(model: Any, tokens: float) -> int:
    """Bytes that `Remembered.of` keeps of so many tokens, at most."""
    # under autocast, too: the last norm's output is in the weights' precision
    width: int = models.causal_lm(model).dtype.itemsize
    return int(tokens) * width * int(models.head(model).weight_VH.shape[1])


def _still(head: Head) -> Head:
    """The head as it is now: copied where it is trained."""
    if not head.trained:
        return head
    bias_V = None if head.bias_V is None else head.bias_V.detach().clone()
    return replace(head, weight_VH=head.weight_VH.detach().clone(), bias_V=bias_V)
