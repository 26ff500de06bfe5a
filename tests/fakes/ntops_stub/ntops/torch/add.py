import torch


def add(input, other, *, alpha=1, out=None):
    return torch.add(input, other, alpha=alpha)
