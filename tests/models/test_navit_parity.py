"""NaViT against vit-pytorch's, where the two agree: the tokens before pooling, packed, and their gradients.

What vit-pytorch does otherwise is changed on its side: LayerNorms around its patch embedding, exact GELU, and the bias
that its output projections lack. Its RMS norms have a scale for each head, ours has one for all: the test gives all
heads the same. It scales no scores, and so our queries' scale is sqrt(C) times theirs. Its pooling is another one (a
residual from the query, no biases, no MLP) and not compared.
"""

import torch
from peers import load, randomize
from torch import nn

from vlkern import data
from vlkern.models.navit import VisionConfig, VisionTower

PATCH, GRIDS = 4, [(3, 5), (1, 1), (2, 6), (6, 2), (4, 4)]
CONFIG = VisionConfig(width=48, depth=2, heads=3, mlp=64, patch=PATCH, grid=6, qk_norm="rms")


def _theirs():
    load("vit_pytorch")
    from vit_pytorch.na_vit import NaViT

    c = CONFIG
    model = NaViT(
        image_size=c.grid * PATCH, patch_size=PATCH, num_classes=2, dim=c.width, depth=c.depth, heads=c.heads,
        mlp_dim=c.mlp, dim_head=c.width // c.heads,
    )  # fmt: skip
    model.to_patch_embedding[0] = model.to_patch_embedding[2] = nn.Identity()
    for attention, forward in model.transformer.layers:
        attention.to_out[0] = nn.Linear(c.width, c.width)
        forward[2] = nn.GELU(approximate="tanh")
        for norm in (attention.q_norm, attention.k_norm):
            nn.init.ones_(norm.gamma)
    randomize(model)
    with torch.no_grad():
        for attention, _ in model.transformer.layers:
            for norm in (attention.q_norm, attention.k_norm):
                norm.gamma.copy_(norm.gamma[:1].expand_as(norm.gamma))
    return model


def _columns(weight):
    """Their patches are (C, ph, pw), ours (ph, pw, C)."""
    return weight.unflatten(1, (3, PATCH, PATCH)).permute(0, 2, 3, 1).flatten(1)


def _names(theirs):
    """Our name -> a function of their parameters (or of their gradients, with scale 1 for what is only scaled)."""

    def sources(of):
        embed = theirs.to_patch_embedding[1]
        found = {
            "embeddings.patch_embedding.weight": _columns(of(embed.weight)),
            "embeddings.patch_embedding.bias": of(embed.bias),
            "embeddings.positions.row_embedding": of(theirs.pos_embed_height),
            "embeddings.positions.column_embedding": of(theirs.pos_embed_width),
            "post_layernorm.weight": of(theirs.transformer.norm.gamma),
        }
        for i, (attention, forward) in enumerate(theirs.transformer.layers):
            k, v = of(attention.to_kv.weight).chunk(2)
            parts = {
                "layer_norm1.weight": of(attention.norm.gamma),
                "self_attn.q_proj.weight": of(attention.to_q.weight),
                "self_attn.k_proj.weight": k,
                "self_attn.v_proj.weight": v,
                "self_attn.out_proj.weight": of(attention.to_out[0].weight),
                "self_attn.out_proj.bias": of(attention.to_out[0].bias),
                "layer_norm2.weight": of(forward[0].gamma),
                "mlp.fc1.weight": of(forward[1].weight),
                "mlp.fc1.bias": of(forward[1].bias),
                "mlp.fc2.weight": of(forward[4].weight),
                "mlp.fc2.bias": of(forward[4].bias),
            }
            found |= {f"encoder.layers.{i}.{name}": tensor for name, tensor in parts.items()}
        return found

    return sources


def test_tokens_and_gradients():
    torch.manual_seed(0)
    theirs, ours = _theirs(), VisionTower(CONFIG).eval()
    sources = _names(theirs)
    state = sources(lambda p: p.detach())
    channels = CONFIG.width // CONFIG.heads
    for i, (attention, _) in enumerate(theirs.transformer.layers):
        state[f"encoder.layers.{i}.self_attn.q_norm.weight"] = attention.q_norm.gamma[0, 0].detach() * channels**0.5
        state[f"encoder.layers.{i}.self_attn.k_norm.weight"] = attention.k_norm.gamma[0, 0].detach()
    state |= {f"head.{name}": tensor for name, tensor in ours.head.state_dict().items()}
    ours.load_state_dict(state)

    pictures = [torch.randn(3, h * PATCH, w * PATCH) for h, w in GRIDS]
    tokens = []
    theirs.transformer.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    theirs([pictures[:3], pictures[3:]])
    lengths = [sum(h * w for h, w in group) for group in (GRIDS[:3], GRIDS[3:])]
    want = torch.cat([row[:length] for row, length in zip(tokens[0], lengths, strict=True)])
    got = ours.tokens(*data.pack_images(pictures, PATCH))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    seeds = torch.randn_like(want)
    (want * seeds).sum().backward()
    (got * seeds).sum().backward()
    parameters = dict(ours.named_parameters())
    for name, grad in sources(lambda p: p.grad).items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(parameters[name].grad, grad, rtol=1e-3, atol=1e-3 * scale, msg=name)
