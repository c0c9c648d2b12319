/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * Keys and values of the maps, all without hidden padding. Addresses are IPv6, IPv4 in mapped form; ports
 * and sequence numbers are in host byte order; times are nanoseconds of CLOCK_BOOTTIME.
 */
#ifndef TIDEGATE_STRUCTS_H
#define TIDEGATE_STRUCTS_H

#include <linux/types.h>

#include "consts.h"

/*
 * An interface. ifindex alone is unique only within one network namespace, and no helper tells a TC program
 * before Linux 6.15 in which one it runs: scope is a constant of the loaded program, the inode number of the
 * namespace, and 0 for programs that are on no interface.
 */
struct tg_interface {
	__u32 scope;
	__u32 ifindex;
};

struct tg_attachment {
	__u64 workload;
	__u64 attached_at;
	__u32 profile;
	__u16 port_count;
	__u8 side;		/* as the agent numbers it; the program does not look */
	__u8 pad;
	__u16 ports[TG_SERVICE_PORTS];
};

/*
 * One TCP connection at an interface, whichever way the packet goes. By interface and not by workload, so that a
 * packet of a known flow needs no other look-up.
 */
struct tg_flow_key {
	struct tg_interface interface;
	__u8 local[16];
	__u8 peer[16];
	__u64 ports;		/* the local one above the peer's, of 16 bits */
};

/* What the hash of a flow's key depends on besides the key: random, so that nobody can choose flows that share one. */
struct tg_flow_seed {
	__u64 words[TG_FLOW_KEY_WORDS];
};

struct tg_flow {
	struct tg_flow_key key;
	__u64 workload;
	__u64 opened;
	__u64 tally[TG_TALLIES];	/* payload by sender, and the connection: how much, and enum tg_place */
	__u64 seat;			/* enum tg_seat: the edge that it was last counted on */
	__u64 segments;			/* packets both ways, as many as they are on the wire */
	__u64 isn[TG_ROLES];		/* the sequence number before the first byte; TG_ISN_KNOWN */
	__u32 contiguous;		/* bytes of the client's stream seen from its start, without a gap */
	__u32 fin;			/* length of the client's stream, with TG_FLOW_CLIENT_FIN */
	__u32 verdict;			/* enum tg_verdict */
	__u32 flags;			/* enum tg_flow_flag */
	__u32 profile;
	__u8 direction;
	__u8 hint;			/* enum tg_hint */
	__u8 turn_state;		/* enum tg_turn */
	__u8 looking;			/* enum tg_looking */

	__u32 base;			/* where the client's own bytes begin: behind a PROXY header */
	__u32 spoke_at;			/* how far the client's stream was when the server began */
	__u32 turn;			/* sequence number where the client's turn begins */
	__u32 turn_known;		/* one bit per byte of turn_bytes */
	__u8 turn_bytes[TG_TURN_BYTES];
};

struct tg_edge_key {
	__u64 workload;
	__u8 peer[16];
	__u16 port;
	__u8 direction;
	__u8 flow_class;
	__u32 pad;
};

struct tg_edge {
	struct tg_edge_key key;
	__u32 generation;		/* raised when the edge is forgotten: the slot's next one has another */
	__u32 state;			/* enum tg_edge_state */
	__s64 tally[TG_TALLIES];	/* below zero where more has left than came, since the edge was made */
	__u64 first_seen;
	__u64 last_seen;
	__u64 tick;			/* jiffies of last_seen */
	__u32 hints;			/* a bit for each enum tg_hint */
	__u32 pad;
};

struct tg_text {
	__u32 length;
	__u8 bytes[TG_TEXT_BYTES];
};

struct tg_profile {
	__u32 suffix_count;
	__u32 alpn_count;
	struct tg_text suffixes[TG_NAMES];	/* lower case, beginning with a dot; a label * is any one */
	struct tg_text alpns[TG_NAMES];
	__u32 port_count;
	__u16 ports[TG_PROXY_PORTS];	/* of the mesh's own listeners */
};

/* Where the walk through a ClientHello stands; see hello.h. */
struct tg_hello {
	__u32 position;		/* next byte of the client's stream to look at */
	__u32 record_left;	/* bytes left of the record */
	__u32 hello_left;	/* bytes left of the ClientHello */
	__u32 extension_left;
	__u32 skip;		/* bytes to pass over before the next field */
	__u32 number;		/* the field so far, big-endian */
	__u16 wanted;		/* bytes that the field still wants */
	__u16 extension;
	__u16 record_length;
	__u16 name_length;
	__u8 field;		/* enum tg_field */
	__u8 record_at;		/* bytes seen of the record's header */
	__u8 outcome;		/* enum tg_outcome */
	__u8 flags;		/* enum tg_hello_flag */
	__u8 name[TG_NAME_BYTES];
};

/*
 * A part of a client's stream while it is looked at. Positions count from the stream's beginning, or from that of a
 * turn; the byte at a position is kept at the position modulo TG_PREFIX_BYTES.
 */
struct tg_prefix {
	__u64 owner;				/* tg_flow.opened */
	__u32 lock;
	__u32 have;				/* bytes known from the start, without a gap */
	__u32 profile;
	__u32 base;				/* where a ClientHello would begin */
	__u32 told;				/* up to where the hello was reported */
	__u32 searched;				/* up to where there is no line feed */
	__u16 port;				/* of the server */
	__u8 turned;				/* enum tg_turn: the client's turn was found in it */
	__u8 pad[5];
	struct tg_hello hello;
	__u64 known[TG_PREFIX_BYTES / 64];	/* one bit per byte, of those behind the first gap */
	__u8 again[128];			/* bytes of a word that come a second time, perhaps */
	__u8 bytes[TG_PREFIX_BYTES + 64];	/* room for the bytes of a word at any position */
};

/* A part of a ClientHello, as the ring buffer has it: only `length` of the bytes are sent. */
struct tg_hello_chunk {
	__u64 opened;				/* tg_flow.opened */
	__u32 position;				/* from the hello's first record header on */
	__u32 length;
	struct tg_flow_key key;
	__u8 bytes[TG_PREFIX_BYTES];
};

/* What is too large for the stack. */
struct tg_scratch {
	struct tg_prefix prefix;
	struct tg_hello_chunk chunk;
};

#endif
