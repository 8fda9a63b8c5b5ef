"""What memory tensors hold."""

import gc

import torch


def storages():
    """Return address -> bytes of all memory that tensors on the CPU hold, each storage once.

    Other tests of this process may have left tensors that are none: of a trace, which have no memory.
    """
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) not in (torch.Tensor, torch.nn.Parameter):
            continue
        if thing.device.type != "cpu" or thing.layout != torch.strided:
            continue
        storage = thing.untyped_storage()
        try:
            found[storage.data_ptr()] = storage.nbytes()
        except RuntimeError as error:
            assert "data pointer" in str(error)
    return found
