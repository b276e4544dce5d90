"""Slices of stored weights, and stored weights stacked, are those of the dense weights."""

import itertools

import pytest
import torch

from pyprune.errors import UserError
from pyprune.ops import mask_nm
from pyprune.sparse import format as formats
from pyprune.sparse.layout import LayerFormat
from pyprune.sparse.slices import alike, stack_rows, take_columns, take_rows

KINDS = [
    ("sparse24", False), ("sparse24", True), ("bitmap", False), ("bitmap", True), ("dense", True),
    ("coded", False),
]  # fmt: skip


def stored(format, int8, rows=12, cols=48, dtype=torch.bfloat16, seed=0):
    """A layer, its parts, and the dense weight that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    if format == "sparse24":
        weight = torch.where(mask_nm(weight, 2, 4), weight, 0.0)
    elif format == "bitmap":
        weight = torch.where(torch.rand(rows, cols, generator=generator) < 0.4, weight, 0.0)
        weight[1] = 0  # a row of nothing
        weight[2, 3] = -0.0  # negative zeros are elements
    weight = weight.to(dtype)
    layer = LayerFormat(format, (rows, cols), int8)
    parts = formats.pack(weight, layer)
    return layer, parts, formats.unpack(layer, parts)


def bits(t):
    return t.contiguous().view(torch.int16)


def check(layer, parts, shape, dense):
    sliced = LayerFormat(layer.format, shape, layer.int8)
    assert tuple(parts) == sliced.parts
    formats.check_tensors("x", sliced, parts, "nowhere")
    assert torch.equal(bits(formats.unpack(sliced, parts)), bits(dense))


@pytest.mark.parametrize(("format", "int8"), KINDS)
@pytest.mark.parametrize(("start", "stop"), [(0, 12), (0, 5), (5, 12), (1, 2), (4, 4)])
def test_rows(format, int8, start, stop):
    layer, parts, dense = stored(format, int8)
    check(layer, take_rows(layer, parts, start, stop), (stop - start, 48), dense[start:stop])


@pytest.mark.parametrize(("format", "int8"), KINDS[:-1])
@pytest.mark.parametrize(("start", "stop"), [(0, 48), (0, 16), (16, 40), (40, 48)])
def test_columns(format, int8, start, stop):
    layer, parts, dense = stored(format, int8)
    taken = take_columns(layer, parts, start, stop)
    check(layer, taken, (12, stop - start), dense[:, start:stop])
    assert all(t.is_contiguous() for t in taken.values())


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(3, 11), (0, 1), (13, 48)])
def test_columns_of_a_bitmap_begin_anywhere(int8, start, stop):
    layer, parts, dense = stored("bitmap", int8)
    check(layer, take_columns(layer, parts, start, stop), (12, stop - start), dense[:, start:stop])


@pytest.mark.parametrize(("start", "stop"), [(4, 16), (0, 12)])
def test_columns_of_24_do_not(start, stop):
    layer, parts, _ = stored("sparse24", False)
    with pytest.raises(UserError, match=f"multiple of 8, got {start} to {stop}"):
        take_columns(layer, parts, start, stop)


def test_columns_of_coded_rows_are_refused():
    layer, parts, _ = stored("coded", False)
    with pytest.raises(UserError, match="coded: expected all 48 columns"):
        take_columns(layer, parts, 0, 24)


@pytest.mark.parametrize(("format", "int8"), KINDS)
@pytest.mark.parametrize("rows", [(4,), (3, 7), (1, 0, 5)])
def test_stacked(format, int8, rows):
    made = [stored(format, int8, seed=i) for i in range(len(rows))]
    weights = [
        (LayerFormat(format, (r, 48), int8), take_rows(layer, parts, 0, r))
        for (layer, parts, _), r in zip(made, rows, strict=True)
    ]
    assert all(alike(a, b) for (a, _), (b, _) in itertools.product(weights, weights))
    whole, parts = stack_rows(weights)
    assert whole.shape == (sum(rows), 48)
    dense = torch.cat([d[:r] for (_, _, d), r in zip(made, rows, strict=True)])
    check(whole, parts, whole.shape, dense)


def test_rows_and_columns_commute():
    layer, parts, dense = stored("bitmap", True, 16, 40)
    rows = take_rows(layer, parts, 3, 9)
    both = take_columns(LayerFormat("bitmap", (6, 40), True), rows, 8, 24)
    check(layer, both, (6, 16), dense[3:9, 8:24])


@pytest.mark.parametrize(
    "other",
    [LayerFormat("bitmap", (4, 16)), LayerFormat("sparse24", (4, 24)),
     LayerFormat("sparse24", (4, 16), True)],
)  # fmt: skip
def test_what_is_not_alike(other):
    assert not alike(LayerFormat("sparse24", (8, 16)), other)
