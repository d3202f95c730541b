"""Codes and positions in few bits: packing for the file, unpacking in TorchScript.

Codes of b bits lie as whole bytes first, then one plane per remaining bit, 8 codes to a byte: any b costs exactly b
bits per code. Where k values fit a byte better as digits of base k (3, 5, 6: 5, 3, 3 digits), they lie so: 1.6 bits
for 3 values. Positions lie as a bitmap, or as the gaps between them in w bits, of which the largest is an escape:
"go on by 2ʷ − 1, nothing here".
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GAP_BITS_MAX = 31
DIGITS_IN_A_BYTE = {3: 5, 5: 3, 6: 3}  # of bases that cost less than whole bits


def code_bits(size: int) -> int:
    """Bits of one code of `size` values, where codes do not lie as digits."""
    return max((size - 1).bit_length(), 1)


def packed_bytes(count: int, size: int) -> int:
    """Bytes that `count` codes of `size` values take."""
    if size in DIGITS_IN_A_BYTE:
        return -(-count // DIGITS_IN_A_BYTE[size])
    bits = code_bits(size)
    return (bits // 8) * count + (bits % 8) * (-(-count // 8))


def pack_codes(codes: Tensor, size: int) -> Tensor:
    """Pack codes below `size`.

    Parameters
    ----------
    codes : Tensor
        Integers, any shape.
    size : int
        Number of values, at most 65536.

    Returns
    -------
    Tensor
        uint8, ``(packed_bytes(count, size),)``, on the CPU.
    """
    flat = codes.detach().reshape(-1).cpu().numpy()
    if size in DIGITS_IN_A_BYTE:
        digits = DIGITS_IN_A_BYTE[size]
        padded = np.zeros(-(-flat.size // digits) * digits, dtype=np.uint8)
        padded[: flat.size] = flat
        weights = (size ** np.arange(digits)).astype(np.uint8)
        return torch.from_numpy((padded.reshape(-1, digits) * weights).sum(axis=1, dtype=np.uint8))
    return torch.from_numpy(_pack_bits(flat, code_bits(size)))


def unpack_codes(packed: Tensor, size: int, count: int) -> Tensor:
    """Unpack what `pack_codes` has packed; TorchScript.

    Returns
    -------
    Tensor
        ``(count,)``, uint8 up to 256 values, else int32, on the device of `packed`.
    """
    digits = 0
    if size == 3:
        digits = 5
    elif size in (5, 6):
        digits = 3
    if digits == 0:
        bits = 1
        while (1 << bits) < size:
            bits += 1
        return unpack_bits(packed, bits, count)
    places: list[Tensor] = []
    rest = packed
    for _ in range(digits):
        above = torch.div(rest, size, rounding_mode="floor")
        places.append(rest - above * size)
        rest = above
    return torch.stack(places, dim=1).reshape(-1)[:count]


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack codes of `bits` bits, at most 31; TorchScript.

    Returns
    -------
    Tensor
        ``(count,)``, uint8 up to 8 bits, else int32.
    """
    kind = torch.uint8 if bits <= 8 else torch.int32
    whole = bits // 8
    codes = torch.zeros(count, dtype=kind, device=packed.device)
    for byte in range(whole):
        codes = codes | (packed[byte * count : (byte + 1) * count].to(kind) * (1 << (8 * byte)))
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    row = (count + 7) // 8
    for plane in range(bits - 8 * whole):
        start = whole * count + plane * row
        spread = packed[start : start + row].unsqueeze(1).bitwise_right_shift(shifts).bitwise_and(1)
        codes = codes | (spread.reshape(-1)[:count].to(kind) * (1 << (8 * whole + plane)))
    return codes


@dataclass(frozen=True)
class PackedIndex:
    """How the positions of kept weights lie in the file.

    Parameters
    ----------
    bits : int
        0 for a bitmap, else those of one gap.
    entries : int
        Of a bitmap its bits; of gaps their number, escapes included.
    """

    bits: int
    entries: int

    @property
    def kind(self) -> str:
        """Name in the layer plan."""
        return "delta" if self.bits else "bitmap"

    @property
    def stored_bytes(self) -> int:
        """Size of the buffer."""
        bits = max(self.bits, 1)
        return (bits // 8) * self.entries + (bits % 8) * (-(-self.entries // 8))


def choose_index(positions: Tensor, count: int) -> PackedIndex:
    """Find the smallest way to store rising positions below `count`: a bitmap, or gaps of the best width."""
    best, kept = PackedIndex(0, count), positions.numel()
    if 2 * kept >= count:
        return best
    gaps = _gaps(positions)
    for bits in range(2, _widest(count) + 1):
        if bits * kept >= 8 * best.stored_bytes:
            break  # without any escape
        gaps_with_escapes = gaps[gaps >= 2**bits - 1]
        found = PackedIndex(bits, kept + int((gaps_with_escapes // (2**bits - 1)).sum()))
        if found.stored_bytes < best.stored_bytes:
            best = found
    return best


def index_bound(kept: int, count: int) -> int:
    """Bytes that no pattern of `kept` positions below `count` exceeds."""
    widths = range(2, _widest(count) + 1)
    gaps = [PackedIndex(bits, kept + (count - kept) // (2**bits - 1)) for bits in widths]
    return min(index.stored_bytes for index in [PackedIndex(0, count), *gaps])


def _widest(count: int) -> int:
    """Bits of the largest gap, and on to whole bytes: of few positions those cost less than planes."""
    return min(GAP_BITS_MAX, -(-max(count, 2).bit_length() // 8) * 8)


def pack_index(positions: Tensor, index: PackedIndex) -> Tensor:
    """Pack rising positions.

    Returns
    -------
    Tensor
        uint8, ``(index.stored_bytes,)``.
    """
    if not index.bits:
        bitmap = np.zeros(index.entries, dtype=np.uint8)
        bitmap[positions.cpu().numpy()] = 1
        return torch.from_numpy(np.packbits(bitmap, bitorder="little"))
    gaps, escape = _gaps(positions), 2**index.bits - 1
    codes = np.full(index.entries, escape, dtype=np.int64)
    codes[np.cumsum(gaps // escape + 1) - 1] = gaps % escape
    return torch.from_numpy(_pack_bits(codes, index.bits))


def unpack_positions(packed: Tensor, bits: int, entries: int) -> Tensor:
    """Unpack what `pack_index` has packed; TorchScript.

    Returns
    -------
    Tensor
        Rising, int64.
    """
    if bits == 0:
        return unpack_bits(packed, 1, entries).nonzero().reshape(-1)
    codes = unpack_bits(packed, bits, entries).to(torch.int64)
    escape = (1 << bits) - 1
    kept = codes != escape
    ends = torch.cumsum(codes + kept.to(torch.int64), dim=0) - 1  # a gap and its weight, or an escape
    return ends[kept]


def _gaps(positions: Tensor) -> NDArray[np.int64]:
    """Zeros before each position."""
    rising = positions.detach().cpu().numpy().astype(np.int64)
    return np.asarray(np.diff(rising, prepend=-1) - 1)


def _pack_bits(codes: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    whole = bits // 8
    parts = [(codes >> (8 * byte)).astype(np.uint8) for byte in range(whole)]
    planes = [((codes >> plane) & 1).astype(np.uint8) for plane in range(8 * whole, bits)]
    parts += [np.packbits(plane, bitorder="little") for plane in planes]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)
