"""The teachers' Adam is torch's, bit for bit, without importing torch's compiler."""

from __future__ import annotations

import torch
from torch import nn

from cpd.teachers.adam import Adam

LR = 1e-2


def networks(number: int) -> list[nn.Sequential]:
    nets = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(number)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    return nets


def take_step(net: nn.Sequential, optimizer: Adam | torch.optim.Adam, seed: int) -> None:
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    # Every other step without the first layer: a parameter without gradient is not updated.
    layers = net if seed % 2 else net[1:]
    layers(inputs if seed % 2 else inputs @ torch.ones(3, 4)).square().sum().backward()
    optimizer.step()


def test_the_bits_are_those_of_torch_and_checkpoints_of_either_load() -> None:
    ours, theirs, resumed = networks(3)
    optimizer, reference = Adam(ours.parameters(), LR), torch.optim.Adam(theirs.parameters(), LR, fused=True)
    for seed in range(6):
        take_step(ours, optimizer, seed)
        take_step(theirs, reference, seed)
        if seed == 2:
            resumed.load_state_dict(theirs.state_dict())
            continued = Adam(resumed.parameters(), LR)
            continued.load_state_dict(torch.optim.Adam.state_dict(reference))
            state = {i: {k: v.clone() for k, v in s.items()} for i, s in continued.state_dict()["state"].items()}
            continued.load_state_dict({"state": state})
        elif seed > 2:
            take_step(resumed, continued, seed)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
        assert torch.equal(resumed.state_dict()[name], tensor)
