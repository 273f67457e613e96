"""Lossless compression of every flat part: DEFLATE, gzip, zstd, lz4.

    raw length, uint64 LE | compressed length, uint64 LE | compressed bytes | zero bytes

Both lengths are checked before memory is allocated: the raw one against the table and the chain, and against
`limits.COMPRESSION_RATIO` times the compressed bytes. The encoder pads parts that shrink further with zeros, so no
honest
message looks like a decompression bomb. Weights hardly shrink (docs/operators.md); quantised or sparse ones a little
more.

zstandard and lz4 are extras, imported only when a chain names them.
"""

from __future__ import annotations

import struct
import zlib
from abc import abstractmethod
from importlib import import_module
from typing import Any, ClassVar

import torch
from pydantic import Field

from fedloom.common.errors import UserError
from fedloom.messages import limits
from fedloom.messages.operators.base import Around, Notes, Operator, OperatorOptions, check_no_notes
from fedloom.messages.operators.flat import BadPayload, Part, Parts, Spec, raw_bytes

HEAD = struct.Struct("<QQ")


#: The largest window of zstd that is allocated for a small part; the encoder's level 19 uses no larger one.
WINDOW = 8 << 20


class Compress(Operator):
    """A compressor. Subclasses define `squeeze` and `expand`."""

    name: ClassVar[str]

    @abstractmethod
    def squeeze(self, data: memoryview) -> bytes:
        """Compress. Equal input gives equal bytes on every machine with the same library."""

    @abstractmethod
    def expand(self, data: bytes, size: int) -> bytes:
        """Decompress to at most `size` bytes.

        Raises ValueError, or the library's own error (`errors`), for damaged data.
        """

    #: Exceptions that the library raises.
    errors: tuple[type[Exception], ...] = (ValueError,)

    def layout(self, spec: Spec, exact: bool = False) -> Spec:
        """Bound the size: no compressor here adds more than a sixteenth and a kilobyte."""
        return {
            f"{n}.{self.name}": Part(torch.uint8, HEAD.size + part.nbytes * 17 // 16 + 1024, bound=True)
            for n, part in spec.items()
        }

    def encode(self, parts: Parts, around: Around) -> tuple[Parts, Notes]:
        made: Parts = {}
        for name, values in parts.items():
            raw = raw_bytes(values)
            squeezed = self.squeeze(raw)
            data = bytearray(
                HEAD.pack(len(raw), len(squeezed)) + squeezed + bytes(_padding_size(len(raw), len(squeezed)))
            )
            made[f"{name}.{self.name}"] = torch.frombuffer(data, dtype=torch.uint8)
        return made, {}

    def decode(self, parts: Parts, spec: Spec, notes: Notes, around: Around) -> Parts:
        check_no_notes(notes)
        return {n: self._decompress(parts[f"{n}.{self.name}"], part) for n, part in spec.items()}

    def _decompress(self, packed: torch.Tensor, part: Part) -> torch.Tensor:
        data = raw_bytes(packed)
        if len(data) < HEAD.size:
            raise BadPayload(f"a part compressed by {self.name} is shorter than its own header")
        raw, squeezed = HEAD.unpack(data[: HEAD.size])
        if raw > part.nbytes or (raw != part.nbytes and not part.bound):
            raise BadPayload(f"a part compressed by {self.name} claims {raw} bytes, but must have {part.nbytes}")
        if raw > limits.COMPRESSION_RATIO * len(data):
            raise BadPayload(
                f"{len(data)} bytes compressed by {self.name} claim to hold {raw}, but at most "
                f"{limits.COMPRESSION_RATIO} times as many are allowed"
            )
        end = HEAD.size + squeezed
        if len(data) != end + _padding_size(raw, squeezed) or any(data[end:]) or raw % part.dtype.itemsize:
            raise BadPayload(f"a part compressed by {self.name} is truncated, or longer than it claims")
        try:
            expanded = self.expand(bytes(data[HEAD.size : end]), raw)
        except self.errors as error:
            raise BadPayload(f"a part compressed by {self.name} is damaged ({type(error).__name__})") from error
        if len(expanded) != raw:
            raise BadPayload(f"a part compressed by {self.name} does not have the {raw} bytes that it claims")
        if not raw:
            return torch.empty(0, dtype=part.dtype)
        return torch.frombuffer(bytearray(expanded), dtype=torch.uint8).view(part.dtype)


class ZlibOptions(OperatorOptions):
    level: int = Field(6, ge=1, le=9, description="1 is fast, 9 is small")


def _padding_size(raw: int, squeezed: int) -> int:
    """Return how many zero bytes to append to data that shrank by more than the ratio."""
    return max(0, -(-raw // limits.COMPRESSION_RATIO) - squeezed - HEAD.size)


class Deflate(Compress):
    """Raw DEFLATE (RFC 1951)."""

    name = "deflate"
    window = -15
    errors = (ValueError, zlib.error)
    Options: ClassVar[type[OperatorOptions]] = ZlibOptions
    options: ZlibOptions

    def squeeze(self, data: memoryview) -> bytes:
        squeezer = zlib.compressobj(self.options.level, wbits=self.window)
        return squeezer.compress(data) + squeezer.flush()

    def expand(self, data: bytes, size: int) -> bytes:
        expander = zlib.decompressobj(wbits=self.window)
        out = expander.decompress(data, max(1, size))
        if not expander.eof:  # an empty block may end the stream; one more byte would be too many
            out += expander.decompress(expander.unconsumed_tail, 1)
        if not expander.eof or expander.unused_data:
            raise ValueError("the stream does not end where it should")
        return out


class Gzip(Deflate):
    """DEFLATE with gzip's header and checksum (RFC 1952). It stores no time, so equal input gives equal bytes."""

    name = "gzip"
    window = 31


class ZstdOptions(OperatorOptions):
    level: int = Field(3, ge=1, le=19, description="1 is fast, 19 is small")


class Zstd(Compress):
    """Zstandard (RFC 8878); a frame has its own size, which is checked too."""

    name = "zstd"
    Options: ClassVar[type[OperatorOptions]] = ZstdOptions
    options: ZstdOptions

    def __init__(self, options: OperatorOptions) -> None:
        super().__init__(options)
        self._library: Any = import_library("zstandard", "zstd")
        self.errors = (ValueError, self._library.ZstdError)

    def squeeze(self, data: memoryview) -> bytes:
        squeezed: bytes = self._library.ZstdCompressor(level=self.options.level).compress(data)
        return squeezed

    def expand(self, data: bytes, size: int) -> bytes:
        frame = self._library.get_frame_parameters(data)
        if frame.content_size != size or frame.window_size > max(WINDOW, 2 * size):
            raise ValueError("the frame has another size than the part claims")
        expanded: bytes = self._library.ZstdDecompressor().decompress(
            data, max_output_size=size, read_across_frames=False, allow_extra_data=False
        )
        return expanded


class Lz4Options(OperatorOptions):
    level: int = Field(0, ge=0, le=12, description="0 is fast, 12 is small")


class Lz4(Compress):
    """LZ4's frame format: the fastest compressor, with the least compression."""

    name = "lz4"
    Options: ClassVar[type[OperatorOptions]] = Lz4Options
    options: Lz4Options

    def __init__(self, options: OperatorOptions) -> None:
        super().__init__(options)
        self._library: Any = import_library("lz4.frame", "lz4")
        self.errors = (ValueError, RuntimeError, EOFError)

    def squeeze(self, data: memoryview) -> bytes:
        squeezed: bytes = self._library.compress(data, compression_level=self.options.level)
        return squeezed

    def expand(self, data: bytes, size: int) -> bytes:
        expander = self._library.LZ4FrameDecompressor()
        out: bytes = expander.decompress(data, max_length=size + 1)
        if not expander.eof or expander.unused_data:
            raise ValueError("the frame does not end where it should")
        return out


def import_library(module: str, extra: str) -> Any:
    """Import an optional compression library. Raises UserError that names the extra."""
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f'the operator {extra} needs the package {package}: pip install "fedloom[{extra}]"') from None
