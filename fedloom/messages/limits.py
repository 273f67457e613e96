"""The largest things that a message may hold, in one place. Whatever comes from outside is measured against these first.

A limit is checked on what a message *claims*, before anything of that size is allocated. This file knows no format.
"""

from __future__ import annotations

#: A payload's metadata is small: whatever enters maths is a tensor. Bytes as JSON, and how deep lists and mappings nest.
METADATA_BYTES = 16 * 1024


METADATA_DEPTH = 32


#: A message's JSON header, table of names included.
HEADER_BYTES = 8 << 20


#: The table of names: tensors in a payload, characters of a name, dimensions of a tensor.
TENSORS = 100_000


NAME_CHARACTERS = 512


DIMENSIONS = 16


#: Bytes of a payload once all operators are undone (a 7B model in fp32 has 28 GB).
PAYLOAD_BYTES = 64 << 30


#: How many bytes may come out of one byte of a compressed part. The encoder pads what would shrink further.
COMPRESSION_RATIO = 1000


#: Operators in a chain.
OPERATORS = 16


#: Pieces in which a message goes out.
CHUNK_BYTES = 1 << 20
