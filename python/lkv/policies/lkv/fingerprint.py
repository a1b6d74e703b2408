"""What tells the weights of one model from those of another fine-tune."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from transformers import PreTrainedModel

VALUES = 64  # of every parameter, evenly spread


def fingerprint(model: PreTrainedModel) -> str:
    """32 hexadecimal digits: a hash of names, shapes and some values of all parameters of the decoder.

    The values are those in bfloat16, so that a model has one fingerprint in float32 and in bfloat16; its device does
    not matter. What is around a decoder (a head, a wrapper) changes no keys and values and is left out. Adapters, and
    rounding to float16 or fewer bits, make another model.

    Raises:
        ValueError: for a model whose weights are not in memory (on the device "meta").
    """
    decoder: nn.Module = model.get_decoder()
    parameters = sorted(decoder.named_parameters(), key=lambda item: item[0])
    absent = [name for name, parameter in parameters if parameter.is_meta]
    if absent:
        raise ValueError(
            f"lkv: expected a model whose weights are in memory, as they are compared, got {absent[0]} on the device "
            "'meta'; lkv.load(..., any_weights=True) compares none"
        )
    samples = []
    for _, parameter in parameters:
        count = parameter.numel()
        places = torch.arange(min(count, VALUES), device=parameter.device) * count // max(min(count, VALUES), 1)
        samples.append(parameter.detach().flatten()[places].to(torch.bfloat16).view(torch.int16).cpu())
    names = "".join(f"{name} {list(parameter.shape)}\n" for name, parameter in parameters)
    digest = hashlib.sha256(names.encode())
    digest.update(torch.cat(samples).numpy().tobytes())
    return digest.hexdigest()[:32]
