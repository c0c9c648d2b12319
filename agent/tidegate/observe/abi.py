"""The classifier's maps as Python sees them: bpf/consts.h and bpf/structs.h, transcribed.

One class per enum and per struct of the headers, same names without the prefix tg_, same order. A test compares
them with what the compiler makes of the headers. No behaviour, no I/O.
"""

import ctypes
import enum

FLOW_KEY_WORDS = 6
EDGES_MAX = 65536
SERVICE_PORTS = 16
NAMES = 8
TEXT_BYTES = 128
PREFIX_BYTES = 4096
PROXY_PORTS = 16
TURN_BYTES = 24
HINT_BYTES = 1024
HELLOS_BYTES = 1 << 20


class Class(enum.IntEnum):
    EMPTY = 0
    PLAINTEXT = 1
    TLS = 2
    MESH = 3
    SERVER_FIRST = 4
    STARTTLS = 5
    UNKNOWN = 6


class Direction(enum.IntEnum):
    INBOUND = 0
    OUTBOUND = 1


class Role(enum.IntEnum):
    CLIENT = 0
    SERVER = 1


class Tally(enum.IntEnum):
    CONNECTION = 2


class Place(enum.IntEnum):
    SHIFT = 56
    NOWHERE = 0x7F
    OVERFLOW = 0x80


class EdgeState(enum.IntEnum):
    FREE = 0
    LIVE = 1
    LEAVING = 2


class FlowFlag(enum.IntFlag):
    SYN_SEEN = 1 << 0
    FIRST_BYTE_SEEN = 1 << 1
    SERVER_FIRST = 1 << 2
    CLOSED = 1 << 3
    CLIENT_FIN = 1 << 4
    TLS_HEADERS = 1 << 5
    PREFIX_STORED = 1 << 6
    REPLACED = 1 << 7
    SERVER_SPOKE = 1 << 8
    PROXY = 1 << 9
    SSLV2 = 1 << 10
    OVERLAP = 1 << 11


class Verdict(enum.IntFlag):
    CLASS = 0xFF
    SETTLED = 1 << 8
    DECIDED = 1 << 9


class Looking(enum.IntEnum):
    AT_BEGINNING = 0
    AT_HINT = 1
    AT_REPORT = 2
    AT_NOTHING = 3


class Turn(enum.IntEnum):
    OVER = 0
    OPEN = 1
    TAKEN = 2


class Hint(enum.IntEnum):
    NONE = 0
    HTTP1 = 1
    H2C = 2
    POSTGRES = 3
    MYSQL = 4
    REDIS = 5
    KAFKA = 6
    SSH = 7
    AMQP = 8
    MONGODB = 9
    CASSANDRA = 10


class Counter(enum.IntEnum):
    NOT_IP = 0
    NOT_TCP = 1
    JOINED_MIDSTREAM = 2
    HELLO_MALFORMED = 3
    BAD_HEADERS = 4
    OUT_OF_WINDOW = 5
    NO_WORKLOAD = 6
    HELLO_NOT_REPORTED = 7
    HINT_LOST = 8
    TCP_FRAGMENT = 9
    TOO_MANY_HEADERS = 10
    FLOW_NOT_STORED = 11
    EDGE_NOT_STORED = 12
    PREFIX_NOT_STORED = 13
    PREFIX_EVICTED = 14
    PREFIX_BUSY = 15
    BYTES_MISSED = 16
    RACE_LOST = 17


COUNTER_LOSSES = Counter.TCP_FRAGMENT
"""The first counter that means that evidence was lost."""

_u8, _u16, _u32, _u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
_i64 = ctypes.c_int64
_Address = ctypes.c_uint8 * 16


class Interface(ctypes.Structure):
    _fields_ = (("scope", _u32), ("ifindex", _u32))


class Attachment(ctypes.Structure):
    _fields_ = (
        ("workload", _u64),
        ("attached_at", _u64),
        ("profile", _u32),
        ("port_count", _u16),
        ("side", _u8),
        ("pad", _u8),
        ("ports", _u16 * SERVICE_PORTS),
    )


class FlowKey(ctypes.Structure):
    _fields_ = (
        ("interface", Interface),
        ("local", _Address),
        ("peer", _Address),
        ("ports", _u64),
    )


class FlowSeed(ctypes.Structure):
    _fields_ = (("words", _u64 * FLOW_KEY_WORDS),)


class Flow(ctypes.Structure):
    _fields_ = (
        ("key", FlowKey),
        ("workload", _u64),
        ("opened", _u64),
        ("tally", _u64 * 3),
        ("seat", _u64),
        ("segments", _u64),
        ("isn", _u64 * 2),
        ("contiguous", _u32),
        ("fin", _u32),
        ("verdict", _u32),
        ("flags", _u32),
        ("profile", _u32),
        ("direction", _u8),
        ("hint", _u8),
        ("turn_state", _u8),
        ("looking", _u8),
        ("base", _u32),
        ("spoke_at", _u32),
        ("turn", _u32),
        ("turn_known", _u32),
        ("turn_bytes", _u8 * TURN_BYTES),
    )


class EdgeKey(ctypes.Structure):
    _fields_ = (
        ("workload", _u64),
        ("peer", _Address),
        ("port", _u16),
        ("direction", _u8),
        ("flow_class", _u8),
        ("pad", _u32),
    )


class Edge(ctypes.Structure):
    _fields_ = (
        ("key", EdgeKey),
        ("generation", _u32),
        ("state", _u32),
        ("tally", _i64 * 3),
        ("first_seen", _u64),
        ("last_seen", _u64),
        ("tick", _u64),
        ("hints", _u32),
        ("pad", _u32),
    )


class Text(ctypes.Structure):
    _fields_ = (("length", _u32), ("bytes", _u8 * TEXT_BYTES))


class Profile(ctypes.Structure):
    _fields_ = (
        ("suffix_count", _u32),
        ("alpn_count", _u32),
        ("suffixes", Text * NAMES),
        ("alpns", Text * NAMES),
        ("port_count", _u32),
        ("ports", _u16 * PROXY_PORTS),
    )


class HelloChunk(ctypes.Structure):
    _fields_ = (
        ("opened", _u64),
        ("position", _u32),
        ("length", _u32),
        ("key", FlowKey),
        ("bytes", _u8 * PREFIX_BYTES),
    )
