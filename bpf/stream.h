/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * What a connection turns out to be, by what its two ends say: from their segments to the flow's verdict. The client's
 * first bytes are put together by stream position (prefix.h) and looked at as they grow (hello.h).
 */
#ifndef TIDEGATE_STREAM_H
#define TIDEGATE_STREAM_H

#include "edges.h"
#include "hello.h"
#include "packet.h"
#include "prefix.h"

/* The class of a stream whose server may have spoken first. */
static __always_inline enum tg_class after_server(const struct tg_flow *flow, enum tg_class class)
{
	if (!(flow->flags & TG_FLOW_SERVER_FIRST) || class == TG_UNKNOWN)
		return class;
	return class == TG_PLAINTEXT ? TG_SERVER_FIRST : TG_STARTTLS;
}

/* The client's stream has ended, or will never be whole: what was seen of it has to do. */
static __always_inline void conclude(const struct tg_flow_key *key, struct tg_flow *flow)
{
	__u32 sent = bytes_of(flow, TG_CLIENT);
	enum tg_class class = TG_PLAINTEXT;

	if (!sent)
		return;
	if (flow->flags & TG_FLOW_TLS_HEADERS)
		class = TG_TLS;
	else if (flow->contiguous < sent)
		class = TG_UNKNOWN;
	settle(key, flow, after_server(flow, class));
}

/* Gives the flow the verdict that the walk through its prefix came to, if it came to one. */
static __always_inline void apply_outcome(const struct tg_flow_key *key, struct tg_flow *flow,
					  const struct tg_prefix *prefix)
{
	enum tg_class class;

	switch (prefix->hello.outcome) {
	case TG_MESH_HELLO:
		class = TG_MESH;
		break;
	case TG_BROKEN_HELLO:
		count(TG_HELLO_MALFORMED);
		class = TG_TLS;
		break;
	case TG_OTHER_HELLO:
		class = TG_TLS;
		break;
	case TG_NOT_TLS:
		class = TG_PLAINTEXT;
		break;
	default:
		if (prefix->have < TG_PREFIX_BYTES)
			return;
		count(TG_HELLO_TOO_LONG);
		class = TG_TLS;
	}
	give_verdict(key, flow, after_server(flow, class) | TG_VERDICT_SETTLED);
}

/* A part of the client's stream: its bytes [start, end), at offset in the packet. */
struct part {
	__u32 offset;
	__u32 start;
	__u32 end;
};

/* Takes a part of the stream into the prefix, and draws the conclusions. */
static __always_inline void look(struct __sk_buff *skb, const struct tg_flow_key *key,
				 struct tg_flow *flow, struct tg_prefix *prefix,
				 const struct part *part)
{
	if (fill_prefix(skb, prefix, part->offset, part->start, part->end))
		count(TG_BAD_HEADERS);
	walk_hello(prefix);
	flow->contiguous = prefix->have;
	if (prefix->have)
		set_flag(flow, TG_FLOW_FIRST_BYTE_SEEN);
	if (prefix->hello.flags & TG_HELLO_HEADERS)
		set_flag(flow, TG_FLOW_TLS_HEADERS);
	apply_outcome(key, flow, prefix);
}

static __always_inline void begin_prefix(struct tg_prefix *prefix, const struct tg_flow *flow)
{
	prefix->owner = flow->opened;
	prefix->lock = 0;
	prefix->have = 0;
	prefix->profile = flow->profile;
	prefix->pad = 0;
	begin_hello(&prefix->hello);
	__builtin_memset(prefix->known, 0, sizeof(prefix->known));
}

/* A prefix that is in the map, where another processor may be at work on it or may just have settled the flow. */
static __noinline int look_shared(struct __sk_buff *skb, const struct tg_flow_key *key,
				  struct tg_flow *flow, struct tg_prefix *prefix,
				  const struct part *part)
{
	if (lock_prefix(prefix)) {
		count(TG_PREFIX_BUSY);
		return 0;
	}
	if (prefix->owner == flow->opened && !is_settled(flow))
		look(skb, key, flow, prefix, part);
	unlock_prefix(prefix);
	if (is_settled(flow))
		bpf_map_delete_elem(&prefixes, key);
	return 0;
}

/* A new part of the stream of a flow that is not settled. */
static __noinline int collect(struct __sk_buff *skb, const struct tg_flow_key *key,
			      struct tg_flow *flow, const struct part *part)
{
	struct tg_prefix *prefix;
	__u32 zero = 0;

	prefix = bpf_map_lookup_elem(&prefixes, key);
	if (prefix && prefix->owner != flow->opened) {
		/* Left behind by a flow of the same tuple that was evicted. */
		bpf_map_delete_elem(&prefixes, key);
		prefix = NULL;
	}
	if (prefix)
		return look_shared(skb, key, flow, prefix, part);
	if (flow->flags & TG_FLOW_PREFIX_STORED) {
		count(TG_PREFIX_EVICTED);
		settle(key, flow, TG_UNKNOWN);
		return 0;
	}
	prefix = bpf_map_lookup_elem(&scratch, &zero);
	if (!prefix)
		return 0;
	begin_prefix(prefix, flow);
	look(skb, key, flow, prefix, part);
	if (is_settled(flow))
		return 0;
	if (!bpf_map_update_elem(&prefixes, key, prefix, BPF_NOEXIST)) {
		set_flag(flow, TG_FLOW_PREFIX_STORED);
		if (is_settled(flow))
			bpf_map_delete_elem(&prefixes, key);
		return 0;
	}
	prefix = bpf_map_lookup_elem(&prefixes, key);
	if (prefix)
		return look_shared(skb, key, flow, prefix, part);
	count(TG_PREFIX_NOT_STORED);
	settle(key, flow, TG_UNKNOWN);
	return 0;
}

/* Cuts the segment's payload down to the part of the stream that a prefix can hold. */
static __always_inline int part_of(const struct tg_flow *flow, const struct tg_segment *segment,
				   struct part *part)
{
	__s32 start = segment->sequence - flow->isn[TG_CLIENT] - 1;
	__s32 end = start + segment->length;

	part->offset = segment->payload;
	if (start >= TG_PREFIX_BYTES || end <= 0)
		return 0;
	if (start < 0) {
		part->offset -= start;
		start = 0;
	}
	part->start = start;
	part->end = end < TG_PREFIX_BYTES ? end : TG_PREFIX_BYTES;
	return 1;
}

/* Most streams show with their first byte that they are not TLS: those never need a prefix. */
static __always_inline int first_byte_decides(struct __sk_buff *skb, const struct tg_flow_key *key,
					      struct tg_flow *flow, const struct part *part)
{
	__u8 byte;

	if (part->start || flow->contiguous || (flow->flags & TG_FLOW_PREFIX_STORED))
		return 0;
	if (bpf_skb_load_bytes(skb, part->offset, &byte, sizeof(byte)) || byte == RECORD_HANDSHAKE)
		return 0;
	set_flag(flow, TG_FLOW_FIRST_BYTE_SEEN);
	settle(key, flow, after_server(flow, TG_PLAINTEXT));
	return 1;
}

/* A FIN says how long the client's stream is; what has not come by now may still come out of order. */
static __always_inline void client_finished(const struct tg_flow_key *key, struct tg_flow *flow,
					    const struct tg_segment *segment)
{
	__u32 end = segment->sequence + segment->length;

	if (end != next_of(flow, TG_CLIENT))
		return;
	flow->fin = end - flow->isn[TG_CLIENT] - 1;
	set_flag(flow, TG_FLOW_CLIENT_FIN | TG_FLOW_CLOSED);
}

static __noinline int from_client(struct __sk_buff *skb, const struct tg_flow_key *key,
				  struct tg_flow *flow, const struct tg_segment *segment)
{
	struct part part;

	learn_isn(flow, TG_CLIENT, segment);
	take_in(key, flow, TG_CLIENT, segment);
	if (!is_settled(flow) && segment->length && part_of(flow, segment, &part) &&
	    !first_byte_decides(skb, key, flow, &part))
		collect(skb, key, flow, &part);
	/* Payload that does not decide yet. If nothing follows, the flow was not empty and is not known. */
	if (segment->length && !is_settled(flow) && flow_class(flow) == TG_EMPTY)
		give_verdict(key, flow, TG_UNKNOWN);
	if (is_settled(flow))
		return 0;
	if (segment->flags & TCP_FIN)
		client_finished(key, flow, segment);
	if (flow->flags & TG_FLOW_CLIENT_FIN) {
		if (flow->contiguous >= flow->fin)
			conclude(key, flow);
		else
			give_verdict(key, flow, TG_UNKNOWN);
	}
	if (segment->flags & TCP_RST)
		conclude(key, flow);
	return 0;
}

/* How many bytes of the client's stream the server has, by its own words. */
static __always_inline __s32 acknowledged(const struct tg_flow *flow, const struct tg_segment *segment)
{
	__s32 bytes = segment->acknowledged - flow->isn[TG_CLIENT] - 1;

	if (!(segment->flags & TCP_ACK) || (segment->flags & TCP_RST))
		return 0;
	if ((flow->flags & TG_FLOW_CLIENT_FIN) && bytes == (__s32)flow->fin + 1)
		return flow->fin;
	return bytes;
}

static __noinline int from_server(const struct tg_flow_key *key, struct tg_flow *flow,
				  const struct tg_segment *segment)
{
	__s32 acked;
	__u32 gain;

	learn_isn(flow, TG_SERVER, segment);
	gain = take_in(key, flow, TG_SERVER, segment);
	if (!is_settled(flow)) {
		acked = acknowledged(flow, segment);
		if (acked > 0 && acked > (__s32)flow->contiguous) {
			count(TG_BYTES_MISSED);
			settle(key, flow, TG_UNKNOWN);
		} else if (gain && !bytes_of(flow, TG_CLIENT)) {
			set_flag(flow, TG_FLOW_SERVER_FIRST);
			give_verdict(key, flow, TG_SERVER_FIRST);
		}
	}
	if (segment->flags & TCP_RST) {
		set_flag(flow, TG_FLOW_CLOSED);
		if (!is_settled(flow))
			conclude(key, flow);
	}
	return 0;
}

#endif
