"""The limits on the size of messages, in one place. Everything that comes from outside is checked against them first.

A limit is checked on the size that a message *claims*, before memory of that size is allocated. This file does not know
the format.
"""

from __future__ import annotations

#: Bytes of a payload's metadata as JSON, and how deep it may be nested. Numbers of a computation belong into tensors.
METADATA_BYTES = 16 * 1024


METADATA_DEPTH = 32


#: Bytes of a message's JSON header, table of names included.
HEADER_BYTES = 8 << 20


#: The table of names: tensors of a payload, characters of a name, dimensions of a tensor.
TENSORS = 100_000


NAME_CHARACTERS = 512


DIMENSIONS = 16


#: Bytes of a decoded payload (a 7B model in fp32 has 28 GB).
PAYLOAD_BYTES = 64 << 30


#: Largest number of bytes per byte of a compressed part. The encoder pads parts that would shrink further.
COMPRESSION_RATIO = 1000


#: Largest number of operators in a chain.
OPERATORS = 16


#: Bytes of the chunks in which a message is sent.
CHUNK_BYTES = 1 << 20
