"""An npz is what it says of itself, or is refused before it is unpacked."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bake.errors import SAEError
from bake.reading.arrays import opened_npz, read_npz
from bake.reading.capped import UnreadableError
from bake.sae.array_file import ArrayFile

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.asfortranarray(np.arange(6, dtype=">f8").reshape(2, 3)),
    "c": np.array([1, 2], np.int64),
    "d": np.array(7.0, np.float16),
    "e": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_what_they_were(save: object, tmp_path: Path) -> None:
    save(tmp_path / "x.npz", **ARRAYS)  # type: ignore[operator]
    found = read_npz(tmp_path / "x.npz", 1 << 20)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found[name], array)


def test_numbers_of_a_whole_kind_are_no_weights(tmp_path: Path) -> None:
    """uint16 may be the bits of bfloat16 or counts; complex numbers lose a half unseen."""
    for dtype in ("u2", "i4", "c8", "?", "V2"):
        np.savez(tmp_path / "params.npz", W_enc=np.zeros((3, 4), dtype))
        with pytest.raises(SAEError, match="expected float16, float32 or float64"):
            ArrayFile.open(tmp_path / "params.npz")


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(1 << 22, np.float32))
    assert (tmp_path / "x.npz").stat().st_size < 1 << 15
    with (
        pytest.raises(UnreadableError, match=r"unpacks to 16,777,216 bytes; expected at most 20"),
        opened_npz(tmp_path / "x.npz"),
    ):
        pass


def test_what_is_unpacked_has_a_cap(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(1000, np.float32), b=np.zeros(1000, np.float32))
    assert len(read_npz(tmp_path / "x.npz", 9000)) == 2
    with pytest.raises(UnreadableError, match="expected at most"):
        read_npz(tmp_path / "x.npz", 7999)
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(20_000, np.float32))
    with pytest.raises(UnreadableError, match="unpacks to 80,000 bytes; expected at most 9,000"):
        read_npz(tmp_path / "x.npz", 9000)


def test_a_long_directory_is_not_read(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for i in range(16_000):
            archive.writestr(f"{'x' * 60}{i}.npy", b"")
    (tmp_path / "x.npz").write_bytes(out.getvalue())
    with (
        pytest.raises(UnreadableError, match="directory of more than 1,048,576 bytes"),
        opened_npz(tmp_path / "x.npz"),
    ):
        pass
