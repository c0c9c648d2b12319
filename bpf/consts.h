/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * Numbers that the classifier and its reader share. agent/tidegate/observe/abi.py mirrors them, and
 * tests/unit/test_bpf_layout.py compares the two.
 */
#ifndef TIDEGATE_CONSTS_H
#define TIDEGATE_CONSTS_H

enum tg_limit {
	TG_FLOWS_MAX = 131072,
	TG_FLOW_KEY_WORDS = 6,	/* of 64 bits */
	TG_EDGES_MAX = 65536,
	TG_PREFIXES_MAX = 2048,
	TG_ATTACHMENTS_MAX = 4096,
	TG_PROFILES_MAX = TG_ATTACHMENTS_MAX + 1,
	TG_SERVICE_PORTS = 16,
	TG_PROXY_PORTS = 16,	/* of one profile */
	TG_NAMES = 8,		/* SNI suffixes, and ALPN names, of one profile */
	TG_TEXT_BYTES = 128,	/* the longest of them */
	TG_NAME_BYTES = 256,	/* RFC 1035 2.3.4: 255 for a name; RFC 7301 3.1: 255 for a protocol */
	TG_PREFIX_BYTES = 4096,

	TG_TURN_BYTES = 24,	/* four records of one byte each: the headers of any ClientHello */
	TG_HINT_BYTES = 1024,	/* how far a hint is looked for */
	TG_HELLOS_BYTES = 1 << 20,
};

/* FlowClass of agent/tidegate/model.py. */
enum tg_class {
	TG_EMPTY,
	TG_PLAINTEXT,
	TG_TLS,
	TG_MESH,
	TG_SERVER_FIRST,
	TG_STARTTLS,
	TG_UNKNOWN,
	TG_CLASSES,
};

enum tg_direction {
	TG_INBOUND,
	TG_OUTBOUND,
};

enum tg_role {
	TG_CLIENT,
	TG_SERVER,
	TG_ROLES,
};

/* What is counted on edges: payload by its sender, as enum tg_role, and connections. */
enum tg_tally {
	TG_CONNECTION = TG_ROLES,
	TG_TALLIES,
};

/* tg_flow.tally: how much, and above that where it is counted: a class, or one of the other two; see edges.h. */
enum tg_place {
	TG_PLACE_SHIFT = 56,
	TG_PLACE_NOWHERE = 0x7f,	/* not counted yet */
	TG_PLACE_OVERFLOW = 0x80,	/* in the overflow of the class in the other bits */
};

/* Where an edge is and in which of its lives: slot, class from bit 24 on, generation from bit 32 on. */
enum tg_seat {
	TG_SEAT_CLASS_SHIFT = 24,
	TG_SEAT_GENERATION_SHIFT = 32,
	TG_SEAT_SLOT = (1 << TG_SEAT_CLASS_SHIFT) - 1,	/* of all slots, the one that there is not */
};

/* tg_flow.isn, above the number itself. */
enum tg_isn {
	TG_ISN_KNOWN = 1LL << 32,
};

/* tg_edge.state. */
enum tg_edge_state {
	TG_EDGE_FREE,		/* nobody's, or just being made */
	TG_EDGE_LIVE,
	TG_EDGE_LEAVING,	/* forgotten; its last counts have yet to be told */
};

enum tg_flow_flag {
	TG_FLOW_SYN_SEEN = 1 << 0,
	TG_FLOW_FIRST_BYTE_SEEN = 1 << 1,
	TG_FLOW_SERVER_FIRST = 1 << 2,	/* the server spoke before the client did, PROXY protocol apart */
	TG_FLOW_CLOSED = 1 << 3,	/* a RST, or a FIN from the client */
	TG_FLOW_CLIENT_FIN = 1 << 4,
	TG_FLOW_TLS_HEADERS = 1 << 5,	/* record and handshake header were complete and consistent */
	TG_FLOW_PREFIX_STORED = 1 << 6,
	TG_FLOW_REPLACED = 1 << 7,	/* a SYN begins another connection on its tuple */

	TG_FLOW_SERVER_SPOKE = 1 << 8,	/* tg_flow.spoke_at is known */
	TG_FLOW_PROXY = 1 << 9,		/* the stream begins with a header of the PROXY protocol */
	TG_FLOW_SSLV2 = 1 << 10,	/* its ClientHello has the SSLv2-compatible form */
	TG_FLOW_OVERLAP = 1 << 11,	/* a part of it came twice, with other bytes */
};

/* tg_flow.verdict: a class, and how sure it is. */
enum tg_verdict {
	TG_VERDICT_CLASS = 0xff,
	TG_VERDICT_SETTLED = 1 << 8,	/* for good */
	TG_VERDICT_DECIDED = 1 << 9,	/* by the stream's beginning; an upgrade to TLS may follow */
};

/* What still is collected of a client's stream, in its prefix. */
enum tg_looking {
	TG_AT_BEGINNING,
	TG_AT_HINT,
	TG_AT_REPORT,		/* the class is known, the rest of the hello is wanted */
	TG_AT_NOTHING,
};

/* Whether the client's bytes behind the server's last ones are awaited; see turn.h. */
enum tg_turn {
	TG_TURN_OVER,
	TG_TURN_OPEN,
	TG_TURN_TAKEN,		/* they were a ClientHello, and its rest is wanted */
};

/* Hint of agent/tidegate/model.py; in tg_edge.hints, bit 0 stands for the first one. */
enum tg_hint {
	TG_HINT_NONE,
	TG_HINT_HTTP1,
	TG_HINT_H2C,
	TG_HINT_POSTGRES,
	TG_HINT_MYSQL,
	TG_HINT_REDIS,
	TG_HINT_KAFKA,
	TG_HINT_SSH,
	TG_HINT_AMQP,
	TG_HINT_MONGODB,
	TG_HINT_CASSANDRA,
};

/*
 * Everything that was not looked at or not understood. Up to TG_COUNTER_LOSSES nothing is lost by it; from there
 * on evidence is.
 */
enum tg_counter {
	TG_NOT_IP,		/* neither IPv4 nor IPv6 */
	TG_NOT_TCP,
	TG_JOINED_MIDSTREAM,	/* payload of a flow whose SYN was not seen: class unknown */
	TG_HELLO_MALFORMED,	/* headers of a ClientHello with an inconsistent body: class tls */
	TG_BAD_HEADERS,		/* headers that contradict themselves or the packet: every stack drops it */
	TG_OUT_OF_WINDOW,	/* sequence number too far ahead to be the flow's: the receiver drops it */
	TG_NO_WORKLOAD,		/* packet on an interface that is just being detached */
	TG_HELLO_NOT_REPORTED,	/* a part of a ClientHello that nobody will see, with `report`; its class is known */
	TG_HINT_LOST,		/* bytes that a hint, or MySQL's upgrade, needed: the class is that of the beginning */
	TG_COUNTER_LOSSES,
	TG_TCP_FRAGMENT = TG_COUNTER_LOSSES, /* IP fragment of a TCP segment */
	TG_TOO_MANY_HEADERS,	/* more VLAN tags or IPv6 extension headers than are followed */
	TG_FLOW_NOT_STORED,	/* the flow map refused an entry */
	TG_EDGE_NOT_STORED,	/* there was no room for an edge: counted in the overflow of its class */
	TG_PREFIX_NOT_STORED,	/* the prefix map refused an entry: class unknown */
	TG_PREFIX_EVICTED,	/* a prefix made room for others before it was decided: class unknown */
	TG_PREFIX_BUSY,		/* two processors wanted one prefix for too long: its bytes are missing */
	TG_BYTES_MISSED,	/* the server acknowledged bytes that were not seen: class unknown */
	TG_RACE_LOST,		/* a count that gave up after several processors contended for it */
	TG_COUNTERS,
};

#endif
