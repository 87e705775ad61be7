from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsemix.config import parse
from sparsemix.layers import LayerConfig
from sparsemix.ops import native

SIZE = 2**26  # bytes
PEER = {"kind": "peer", "num_experts": 128**2, "num_heads": 2, "top_k": 3, "d_key": 4}


def huge_kib(tensor):
    """Of the mapping that holds the middle of the tensor, what lies on huge pages."""
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        first = line.split()[0]
        if "-" in first:
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low <= middle < high
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1])
    return 0


def allowed():
    return native.TRANSPARENT.is_file() and "[never]" not in native.TRANSPARENT.read_text(encoding="ascii")


@pytest.mark.skipif(not allowed(), reason="this system allows no transparent huge pages")
def test_a_large_tensor_written_afterwards_lies_on_huge_pages():
    tensor = torch.empty(SIZE, dtype=torch.uint8)
    assert native.huge_pages(tensor) is None
    assert huge_kib(tensor.fill_(1)) >= SIZE // 2048


@pytest.mark.skipif(not allowed(), reason="this system allows no transparent huge pages")
def test_the_tables_of_a_layer_do():
    layer = parse(LayerConfig, PEER).build(1024)
    assert layer.w_in.nbytes == SIZE
    assert min(huge_kib(layer.w_in), huge_kib(layer.w_out)) >= SIZE // 2048


def test_what_has_no_use_for_them_is_left_alone():
    assert native.huge_pages(torch.empty(100)) == "a tensor under 16 MiB has no use for them"
    assert native.huge_pages(torch.empty(SIZE, device="meta")) == "only memory of the CPU has pages to choose"
    with FakeTensorMode():
        assert native.huge_pages(torch.empty(SIZE)) == "only memory of the CPU has pages to choose"


def test_a_system_that_does_not_allow_them_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "TRANSPARENT", tmp_path / "enabled")
    native.TRANSPARENT.write_text("always madvise [never]\n", encoding="ascii")
    assert (
        native.huge_pages(torch.empty(SIZE, dtype=torch.uint8)) == f"the system does not allow them: {tmp_path}/enabled"
    )


def test_layers_are_still_built_without_memory():
    with torch.device("meta"):
        assert parse(LayerConfig, PEER).build(1024).w_in.is_meta
