"""An input of a class of its own: sequences of any length, whose rows are not in dim 0 of its tensors."""

import torch

import descompiler as des


class Jagged:
    """Sequences of any length, one after another, as torchrec's: rows are in the offsets, not in dim 0 of values."""

    def __init__(self, lengths, values):
        self.lengths, self.values = lengths, values


def take_jagged(x, index):
    parts = torch.split(x.values, x.lengths.tolist())
    return Jagged(x.lengths[index], torch.cat([parts[i] for i in index.tolist()] + [x.values[:0]]))


des.register_input(Jagged, lambda x: ([x.lengths, x.values], None), lambda c, _: Jagged(*c), take=take_jagged)
