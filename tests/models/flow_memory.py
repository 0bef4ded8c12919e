"""What a flow keeps for its backward."""

import dataclasses

import torch

from vlkern.models.jet import Jet, JetConfig


def saved_bytes(config: JetConfig, depth: int) -> dict[str, int]:
    """ "plain" and "invertible" -> bytes that autograd saves of a batch, without parameters and buffers."""
    found = {}
    for name, invertible in (("plain", False), ("invertible", True)):
        model = Jet(dataclasses.replace(config, depth=depth, invertible=invertible))
        own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
        kept = {}

        def pack(t, own=own, kept=kept):
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            z, logdet = model(torch.zeros(4, config.tokens, config.token))
        del z, logdet
        found[name] = sum(t.untyped_storage().nbytes() for t in kept.values())
    return found
