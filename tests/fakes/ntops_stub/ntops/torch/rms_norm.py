import torch


def rms_norm(input, normalized_shape, weight=None, eps=None):
    return torch.nn.functional.rms_norm(input, tuple(normalized_shape), weight, eps)
