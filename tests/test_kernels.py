"""The Triton kernels against plain PyTorch. They need a GPU; their last run there is in docs/LOG.md."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sftlab.loss import FrozenHeadLoss
from sftlab.packing import tiles
from sftlab.varlen import varlen_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels run on a CUDA GPU alone")

LENGTHS = [1, 63, 64, 65, 200, 513, 128, 17]
# Largest difference over the largest value of plain float32 attention.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def plain_attention(query, key, value, lengths):
    groups = query.shape[1] // key.shape[1]
    found, start = [], 0
    for length in lengths:
        q, k, v = (t[start : start + length].transpose(0, 1) for t in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        found.append(scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0].transpose(0, 1))
        start += length
    return torch.cat(found)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads, key_heads, size", [(8, 2, 64), (4, 4, 128)])
def test_attention_and_its_gradients(dtype, heads, key_heads, size):
    torch.manual_seed(0)
    table = tiles(LENGTHS).cuda()
    exact = [torch.randn(sum(LENGTHS), n, size, device="cuda") for n in (heads, key_heads, key_heads, heads)]
    exact = [t.to(dtype).float() for t in exact]
    want = [t.clone().requires_grad_() for t in exact[:3]]
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = plain_attention(*want, LENGTHS)
    expected.backward(exact[3])
    got = [t.to(dtype).requires_grad_() for t in exact[:3]]
    output = varlen_attention(*got, table, size**-0.5)[0]
    output.backward(exact[3].to(dtype))
    for found, right in ((output, expected), *((g.grad, w.grad) for g, w in zip(got, want, strict=True))):
        assert (found.float() - right).abs().max() < TOLERANCE[dtype] * right.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", [1000, 128256])
def test_cross_entropy_over_a_frozen_head(dtype, words):
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda").to(dtype)
    weight = (torch.randn(words, 64, device="cuda") / 4).to(dtype)
    positions = torch.randperm(300, device="cuda")[:201]
    targets = torch.randint(0, words, (201,), device="cuda")
    scale = torch.rand(201, device="cuda")
    want = hidden.double().requires_grad_()
    logits = want[positions] @ weight.double().T
    log_probs = logits.log_softmax(-1)
    expected = -log_probs.gather(1, targets[:, None])[:, 0]
    (expected * scale).sum().backward()
    got = hidden.clone().requires_grad_()
    nats, entropies, hits = FrozenHeadLoss.apply(got, weight, positions, targets)
    (nats * scale).sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert (nats - expected).abs().max() < tolerance
    assert (entropies + (log_probs.exp() * log_probs).sum(-1)).abs().max() < tolerance
    assert (hits.bool() == (logits.argmax(-1) == targets)).float().mean() > 0.98
    assert (got.grad - want.grad).abs().max() < tolerance * want.grad.abs().max()
    cosine = torch.cosine_similarity(got.grad.flatten().double(), want.grad.flatten(), dim=0)
    assert cosine > 0.9999
