"""GPU memory that other processes can map; here this process maps its own a second time."""

import os

import pytest
import torch
from pilotfish.kernels.cuda.driver import CudaError
from pilotfish.kernels.cuda.shareable_memory import allocate, fill, map_shared


class At:
    """int32 [size] at an address, for torch.as_tensor."""

    def __init__(self, address, size):
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "<i4", "data": (address, False), "version": 3}


@pytest.mark.gpu
def test_on_a_gpu_what_one_writes_the_other_reads():
    torch.cuda.init()
    memory = allocate(1000, 0)
    assert memory.num_bytes >= 1000
    fill(memory, 0x01020304)
    mapped = torch.as_tensor(At(map_shared(os.dup(memory.descriptor), memory.num_bytes, 0), 250), device="cuda")
    own = torch.as_tensor(At(memory.address, 250), device="cuda")
    os.close(memory.descriptor)
    assert mapped.data_ptr() != own.data_ptr()
    assert mapped.tolist() == [0x01020304] * 250
    mapped.copy_(torch.arange(250))
    assert own.tolist() == list(range(250))


@pytest.mark.gpu
def test_on_a_gpu_what_is_no_memory_is_refused():
    torch.cuda.init()
    read_end, write_end = os.pipe()
    os.close(write_end)
    with pytest.raises(CudaError, match="cuMemImportFromShareableHandle"):
        map_shared(read_end, 1 << 21, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read_end)  # closed all the same
