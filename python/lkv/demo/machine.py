"""What a reader of a demo has to know of the machine and the model."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

import lkv_ext


def describe(model: PreTrainedModel, name: str) -> str:
    config, build = model.config, lkv_ext.build_info()
    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"cpu, {build['cpu_isa']}"
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        f"lkv_ext {build['version']} on {where}; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads\n"
        f"{name}: {model.num_parameters() / 1e6:.1f} million parameters, {config.num_hidden_layers} layers, "
        f"{config.num_key_value_heads} KV heads of {dim}, {str(model.dtype).removeprefix('torch.')}"
    )
