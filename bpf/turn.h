/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * Upgrades to TLS in mid-stream, whatever the protocol. A client begins TLS after a word of its server that allows
 * it (RFC 3207 "220 ready", PostgreSQL's "S", the 200 of HTTP CONNECT, ...), so a ClientHello can only begin where the
 * client's stream stood when the server spoke: there the client's turn begins.
 *
 * The headers of a ClientHello are found in the first TG_TURN_BYTES bytes of a turn, and those are kept in the flow.
 * Most turns are over with their first byte. What comes in front of the headers and lies behind those bytes is not
 * kept: the upgrade is found all the same, but its report has a hole.
 */
#ifndef TIDEGATE_TURN_H
#define TIDEGATE_TURN_H

#include "edges.h"
#include "hello.h"
#include "packet.h"

static __always_inline int can_turn(const struct tg_flow *flow)
{
	return flow_class(flow) == TG_PLAINTEXT || flow_class(flow) == TG_SERVER_FIRST;
}

static __always_inline void open_turn(struct tg_flow *flow, __u32 sequence)
{
	flow->turn = sequence;
	flow->turn_known = 0;
	flow->turn_state = TG_TURN_OPEN;
}

/* The server sent new payload. */
static __always_inline void server_spoke(struct tg_flow *flow)
{
	__u32 sequence = next_of(flow, TG_CLIENT);

	if (flow->turn_state == TG_TURN_OPEN && flow->turn == sequence && !flow->turn_known)
		return;
	if (is_decided(flow) && can_turn(flow))
		open_turn(flow, sequence);
}

/* How many of the turn's bytes are known without a gap. */
static __always_inline __u32 turn_length(const struct tg_flow *flow)
{
	return trailing_zeros(~(__u64)flow->turn_known);
}

/* Bytes that the server has and that were not seen never will be. */
static __always_inline void server_acknowledged(struct tg_flow *flow, __u32 sequence)
{
	if ((__s32)(sequence - flow->turn - turn_length(flow)) > 0)
		flow->turn_state = TG_TURN_OVER;
}

struct taking {
	struct tg_flow *flow;
	struct tg_prefix *prefix;	/* the bytes are in `again`, at their place in the turn */
	__u32 wanted;			/* one bit per byte */
};

static long take_turn_byte(__u32 index, struct taking *taking)
{
	struct tg_flow *flow = taking->flow;
	__u32 mask;
	__u8 byte;

	if (index >= TG_TURN_BYTES)
		return 1;
	mask = 1U << index;
	byte = taking->prefix->again[index];
	if (!(taking->wanted & mask))
		return 0;
	if (!(flow->turn_known & mask)) {
		flow->turn_bytes[index] = byte;
		flow->turn_known |= mask;
	} else if (flow->turn_bytes[index] != byte) {
		set_flag(flow, TG_FLOW_OVERLAP);
	}
	return 0;
}

/* The bytes of the turn, as the beginning of a stream. */
static __always_inline void begin_turn(struct tg_prefix *prefix, const struct tg_flow *flow)
{
	__builtin_memcpy(prefix->bytes, flow->turn_bytes, TG_TURN_BYTES);
	prefix->have = turn_length(flow);
	begin_walk(&prefix->hello, FIELD_MESSAGE_TYPE);
}

/* Whether the turn is known to be a ClientHello. It is over when it is known not to be one. */
static __noinline int turns_to_tls(struct tg_flow *flow, struct tg_prefix *prefix)
{
	prefix->base = 0;
	prefix->port = 0;
	prefix->profile = flow->profile;
	begin_turn(prefix, flow);
	walk(prefix);
	if (prefix->hello.flags & TG_HELLO_HEADERS)
		return 1;
	if (prefix->hello.outcome == TG_NOT_TLS)
		flow->turn_state = TG_TURN_OVER;
	return 0;
}

/* Takes in the turn's bytes [first, TG_TURN_BYTES), as far as there are so many at offset. */
static __always_inline int take_turn(struct __sk_buff *skb, struct tg_flow *flow, struct tg_prefix *prefix,
				     __u32 first, __u32 offset, __u32 length)
{
	struct taking taking = { .flow = flow, .prefix = prefix };
	__u32 number = least(TG_TURN_BYTES - first, length);

	/* It is 1 to TG_TURN_BYTES anyway; the verifier of Linux 6.1 sees it by this alone. */
	asm volatile("" : "+r"(number), "+r"(first));
	number = ((number - 1) & (WORD_BITS - 1)) + 1;
	first &= WORD_BITS - 1;
	if (bpf_skb_load_bytes(skb, offset, &prefix->again[first], number))
		return -1;
	taking.wanted = ((1U << number) - 1) << first;
	bpf_loop(TG_TURN_BYTES, take_turn_byte, &taking, 0);
	return 0;
}

/* The client's payload while its turn is open. Returns whether the turn is known to be a ClientHello. */
static __noinline int hear_turn(struct __sk_buff *skb, struct tg_flow *flow, const struct tg_segment *segment)
{
	__s32 ahead = flow->turn - segment->sequence;	/* payload in front of the turn */
	struct tg_scratch *scratched;
	__u32 zero = 0;
	__u8 byte;

	if (ahead >= (__s32)segment->length || ahead <= -TG_TURN_BYTES) {
		if (!flow->turn_known)
			return 0;
	} else if (ahead >= 0 && !flow->turn_known) {
		if (bpf_skb_load_bytes(skb, segment->payload + ahead, &byte, sizeof(byte)))
			return 0;
		if (byte != RECORD_HANDSHAKE) {
			flow->turn_state = TG_TURN_OVER;
			return 0;
		}
	}
	scratched = bpf_map_lookup_elem(&scratch, &zero);
	if (!scratched)
		return 0;
	if (ahead >= 0 && ahead < (__s32)segment->length)
		take_turn(skb, flow, &scratched->prefix, 0, segment->payload + ahead, segment->length - ahead);
	else if (ahead < 0 && ahead > -TG_TURN_BYTES)
		take_turn(skb, flow, &scratched->prefix, -ahead, segment->payload, segment->length);
	return turns_to_tls(flow, &scratched->prefix);
}

struct turning {
	struct tg_flow *flow;
	struct tg_prefix *prefix;
	__u32 position;
};

static long keep_turn_byte(__u32 index, struct turning *turning)
{
	struct tg_prefix *prefix = turning->prefix;
	__u32 position = turning->position + index;
	__u64 known = prefix->known[(position / WORD_BITS) & (WORDS - 1)];

	if (index >= TG_TURN_BYTES)
		return 1;
	if (position >= prefix->have && !(known & bits(position % WORD_BITS, 1)))
		return 0;
	turning->flow->turn_bytes[index] = *byte_at(prefix, position);
	turning->flow->turn_known |= 1U << index;
	return 0;
}

/* A turn that begins at a position of the prefix, with the bytes that are there already. */
static __always_inline void turn_at(struct tg_flow *flow, struct tg_prefix *prefix, __u32 position)
{
	struct turning turning = { .flow = flow, .prefix = prefix, .position = position };

	open_turn(flow, first_of(flow, TG_CLIENT) + position);
	bpf_loop(TG_TURN_BYTES, keep_turn_byte, &turning, 0);
}

#endif
