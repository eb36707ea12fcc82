"""The base is a second, frozen copy of the weights: for full fine-tuning, or another stage.

dtype     bytes a weight   what it costs in truth
float32   4                nothing
bfloat16  2                rounding of the weights, which bfloat16 training has as well
int8      about 1          matrices in steps of 1/127 of each row's largest weight: at zero drift
                           the divergence is that of the rounding, not 0
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from holdfast import model as models
from holdfast.errors import RequestError
from holdfast.reference import hidden_at

if TYPE_CHECKING:
    import torch

    from holdfast.objective import DenseBase

Dtype = Literal["auto", "float32", "bfloat16", "int8"]
OFFLOAD = "offload"


class Frozen:
    """A whole model of its own that does not move.

    Args:
        model: what to look at; it is this reference's own from here on.
        home: device of the tuned model.
        dtype: what the weights are held in; auto: bfloat16 on an accelerator, else as they are.
        device: where the model lies and runs, such as cpu or cuda:1; None: at home.
            `offload`: it lies on the CPU, and each layer is brought home when it is used.

    Raises:
        RequestError: there is no such device, or int8 is asked of a model with an adapter.
    """

    reads_rows = True

    def __init__(
        self, model: Any, home: torch.device, dtype: Dtype = "auto", device: str | None = None
    ) -> None:
        self.home = home
        lies, self.device = places(device, home)
        _place(model, held_in(dtype, model.dtype, home.type), lies)
        if dtype == "int8":
            from holdfast.reference.int8 import quantize

            quantize(model)
        head = models.head(model)
        bias_V = None if head.bias_V is None else head.bias_V.detach().to(home)
        self._head = replace(head, weight_VH=head.weight_VH.detach().to(home), bias_V=bias_V)
        if device == OFFLOAD:
            from accelerate import cpu_offload

            model.get_output_embeddings().to(home)  # it is run for one position a row
            cpu_offload(model.get_decoder(), home)
        self.model = model.eval()

    @classmethod
    def copy_of(cls, model: Any, dtype: Dtype = "auto", device: str | None = None) -> Frozen:
        """The model as it is now, with all adapters that it carries."""
        lm = models.causal_lm(model)
        if dtype == "int8" and any(hasattr(m, "get_base_layer") for m in lm.modules()):
            raise RequestError(
                "levers.kl_anchor.reference_dtype: int8 is for a copy without an adapter; set "
                "levers.kl_anchor.reference to adapter_off, or reference_dtype to bfloat16"
            )
        lies, _ = places(device, lm.device)
        copied = _copy(lm, held_in(dtype, lm.dtype, lm.device.type), lies)
        return cls(copied, lm.device, dtype, device)

    def view(
        self, input_ids_BW: torch.Tensor, position_ids_BW: torch.Tensor, kl_BW: torch.Tensor
    ) -> DenseBase:
        """The copy's hidden states at `kl_BW`, and its head, on the tuned model's device."""
        from holdfast.objective import DenseBase

        there = (t.to(self.device) for t in (input_ids_BW, position_ids_BW, kl_BW))
        hidden_MH = hidden_at(self.model, *there)
        return DenseBase(hidden_MH.to(self.home), self._head)


def places(device: str | None, home: torch.device) -> tuple[torch.device, torch.device]:
    """Where a copy lies, and where it runs. Raises RequestError where there is no such device."""
    import torch

    if device == OFFLOAD:
        return torch.device("cpu"), home
    if device is None:
        return home, home
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        there = ["cpu", *(f"cuda:{n}" for n in range(count)), OFFLOAD]
        raise RequestError(
            f"levers.kl_anchor.reference_device: '{device}' is not a device of this machine; "
            f"give one of: {', '.join(there)}"
        ) from error
    return place, place


def held_in(dtype: Dtype, weights: torch.dtype, home: str) -> torch.dtype:
    """What the copy's weights are held in; under int8, those that are no matrix of a layer."""
    import torch

    if dtype in ("float32", "bfloat16"):
        named: torch.dtype = getattr(torch, dtype)
        return named
    return weights if home == "cpu" else torch.bfloat16


def size(model: Any, dtype: Dtype, home: str) -> int:
    """Bytes of a copy's weights. The model may be on the meta device."""
    held: int = held_in(dtype, model.dtype, home).itemsize
    total: int = sum(p.numel() for p in model.parameters())
    if dtype != "int8":
        return held * total
    from holdfast.reference.int8 import matrices

    layers = [weight.shape for *_, weight in matrices(model)]
    inside: int = sum(shape.numel() for shape in layers)
    outputs: int = sum(shape[0] for shape in layers)
    return held * (total - inside) + inside + 4 * outputs


def check_room(model: Any, dtype: Dtype, device: str | None) -> None:
    """Hold that a copy fits beside what training will need: gradients and AdamW's two moments.

    Raises:
        RequestError: it does not; the line says what would.
    """
    home = models.causal_lm(model).device
    lies, _ = places(device, home)
    copied = size(models.causal_lm(model), dtype, home.type)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed = copied + (3 * trained if lies == home else 0)
    free = free_memory(lies)
    if needed > free:
        raise RequestError(
            f"levers.kl_anchor.reference: a frozen copy ({copied / 2**30:.2f} GiB) does not fit: "
            f"with gradients and optimizer {needed / 2**30:.2f} GiB are needed on {lies}, "
            f"{free / 2**30:.2f} GiB are free; set levers.kl_anchor.reference_device: offload, "
            "reference_dtype: int8, or build a cache with `holdfast cache build`"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)


def _copy(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A deep copy whose weights go straight to their dtype and device: never a third copy."""
    import torch

    memo: dict[int, Any] = {}
    with torch.no_grad():
        for weight in model.parameters():
            kind = dtype if weight.is_floating_point() else weight.dtype
            memo[id(weight)] = torch.nn.Parameter(
                weight.detach().to(device, kind, copy=True), requires_grad=False
            )
        for buffer in model.buffers():  # such as rotary frequencies, which stay exact
            memo[id(buffer)] = buffer.detach().to(device, copy=True)
    return copy.deepcopy(model, memo)


def _place(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """In place; buffers, such as rotary frequencies, keep their precision."""
    for weight in model.parameters():
        kind = dtype if weight.is_floating_point() else weight.dtype
        weight.requires_grad_(False).data = weight.data.to(device, kind)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
