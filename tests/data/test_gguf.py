"""The GGUF reader on a hand-made file: every block type, the row order of q and k, damage."""

import struct

import numpy as np
import pytest

from pyprune.data.gguf import GgufFile
from pyprune.data.gguf_llama import hugging_face_name, unpermute_rotary
from pyprune.errors import UserError

F32, F16, Q4_0, Q4_1, Q8_0 = 0, 1, 2, 3, 8


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def key_value(key: str, code: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", code) + payload


def gguf_bytes(metadata: list[bytes], tensors: list[tuple[str, tuple[int, ...], int, bytes]]):
    described, blob = b"", b""
    for name, shape, code, data in tensors:
        blob += b"\0" * (-len(blob) % 32)
        dimensions = b"".join(struct.pack("<Q", d) for d in reversed(shape))
        described += string(name) + struct.pack("<I", len(shape)) + dimensions
        described += struct.pack("<IQ", code, len(blob))
        blob += data
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(metadata) + described
    return head + b"\0" * (-len(head) % 32) + blob


def q4_1_block(scale: float, minimum: float, values: list[int]) -> bytes:
    packed = bytes(low | high << 4 for low, high in zip(values[:16], values[16:], strict=True))
    return struct.pack("<ee", scale, minimum) + packed


def test_metadata_of_every_kind():
    data = gguf_bytes(
        [
            key_value("u8", 0, b"\xff"),
            key_value("i8", 1, b"\xff"),
            key_value("flag", 7, b"\x01"),
            key_value("f32", 6, struct.pack("<f", 0.5)),
            key_value("u64", 10, struct.pack("<Q", 2**40)),
            key_value("name", 8, string("Ġnaïve")),
            key_value("list", 9, struct.pack("<IQ", 8, 2) + string("a") + string("")),
        ],
        [],
    )
    assert GgufFile(data).metadata == {
        "u8": 255, "i8": -1, "flag": True, "f32": 0.5, "u64": 2**40, "name": "Ġnaïve",
        "list": ["a", ""],
    }  # fmt: skip


def test_float_tensors_reverse_the_dimensions():
    w = np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5
    file = GgufFile(
        gguf_bytes(
            [], [("a", (2, 3), F32, w.tobytes()), ("b", (2, 3), F16, w.astype("<f2").tobytes())]
        )
    )
    assert file.tensors["a"].shape == (2, 3)
    np.testing.assert_array_equal(file.read("a"), w)
    np.testing.assert_array_equal(file.read("b"), w)
    assert file.read("b").dtype == np.float32


def test_q4_1_low_nibbles_come_first():
    values = [(7 * i) % 16 for i in range(32)]
    data = q4_1_block(0.5, -3.0, values) + q4_1_block(-2.0, 1.0, values[::-1])
    w = GgufFile(gguf_bytes([], [("w", (2, 32), Q4_1, data)])).read("w")
    expected = [[0.5 * v - 3 for v in values], [-2.0 * v + 1 for v in values[::-1]]]
    np.testing.assert_array_equal(w, np.array(expected, np.float32))


def test_q8_0_is_signed():
    values = np.arange(-16, 16, dtype=np.int8) * 8
    data = struct.pack("<e", 0.25) + values.tobytes()
    w = GgufFile(gguf_bytes([], [("w", (32,), Q8_0, data)])).read("w")
    np.testing.assert_array_equal(w, values.astype(np.float32) * 0.25)


def test_unpermute_rotary_undoes_the_interleaving():
    heads, head_dim, columns = 3, 8, 2
    rng = np.random.default_rng(0)
    original = rng.standard_normal((heads * head_dim, columns)).astype(np.float32)
    interleaved = np.empty_like(original)
    for h in range(heads):  # llama.cpp puts component i and i + head_dim / 2 side by side
        for i in range(head_dim // 2):
            interleaved[h * head_dim + 2 * i] = original[h * head_dim + i]
            interleaved[h * head_dim + 2 * i + 1] = original[h * head_dim + head_dim // 2 + i]
    np.testing.assert_array_equal(unpermute_rotary(interleaved, heads), original)


def test_names():
    assert hugging_face_name("token_embd.weight") == "model.embed_tokens.weight"
    assert hugging_face_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    with pytest.raises(UserError, match=r"blk\.0\.ssm_in\.weight"):
        hugging_face_name("blk.0.ssm_in.weight")


WHOLE = gguf_bytes([], [("w", (32,), Q8_0, struct.pack("<e", 1) + bytes(32))])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + WHOLE[4:], "expected a file that begins with"),
        (WHOLE[:4] + struct.pack("<I", 2) + WHOLE[8:], "expected version 3, got 2"),
        (WHOLE[:-1], "tensor w: expected 34 bytes"),
        (WHOLE[:30], "the file ends at 30"),
        (gguf_bytes([], [("w", (32,), Q4_0, bytes(18))]), "tensor w: expected a type of F32"),
        (gguf_bytes([], [("w", (33,), Q8_0, bytes(68))]), "blocks do not divide"),
        (gguf_bytes([key_value("k", 99, b"")], []), "value type 99"),
    ],
)
def test_damage_is_named(data: bytes, message: str):
    with pytest.raises(UserError, match=message):
        GgufFile(data)
