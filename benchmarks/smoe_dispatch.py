"""Tokens sorted by expert (`sparse_experts`) against a loop in which every expert computes every token, and all experts
at once (`dense_experts`) against the same loop: forward and backward, 4096 tokens, 16 experts."""

import torch
from ratios import compare

from retouch.train.smoe_dropout import SMoEDropoutMLP, by_expert, dense_experts, route_top_k, sparse_experts

TOKENS, WIDTH, HIDDEN, EXPERTS = 4096, 256, 64, 16


def loop_experts(tokens, indices, weights, experts):
    share = by_expert(indices, weights, EXPERTS)
    output = torch.zeros_like(tokens)
    for e in range(EXPERTS):
        units = experts.units([torch.nn.functional.linear(tokens, w[e], b[e]) for w, b in experts.inner])
        output = output + share[:, e, None] * torch.nn.functional.linear(units, experts.outer[e], experts.bias[e])
    return output


def step(mix, mlp, tokens, k):
    indices, weights = route_top_k(tokens, mlp.router.weight, mlp.router.bias, k)
    mix(tokens, indices, weights, mlp.experts).square().mean().backward()


if __name__ == "__main__":
    draw = torch.Generator().manual_seed(0)
    mlp = SMoEDropoutMLP(WIDTH, HIDDEN, num_experts=EXPERTS, generator=draw)
    tokens = torch.randn(TOKENS, WIDTH, generator=draw, requires_grad=True)
    for mix, k, wanted in (
        (sparse_experts, 1, "more than 4"),
        (sparse_experts, 4, "more than 2"),
        (dense_experts, 8, "more than 1"),
        (dense_experts, 16, "more than 1"),
    ):
        compare(
            f"{mix.__name__.split('_')[0]} experts, {k} of {EXPERTS} active",
            lambda mix=mix, k=k: step(mix, mlp, tokens, k),
            lambda k=k: step(loop_experts, mlp, tokens, k),
            against="a loop over all experts",
            rounds=5,
            wanted=wanted,
        )
