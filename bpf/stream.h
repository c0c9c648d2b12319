/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * What a connection turns out to be, by what its two ends say: from their segments to the flow's verdict.
 *
 * The client's first bytes are put together by stream position (prefix.h) and looked at as they grow (hello.h), until
 * they decide the class. A stream that is not TLS is looked at for a hint (hints.h), and again at the beginning of
 * each turn of its client (turn.h).
 */
#ifndef TIDEGATE_STREAM_H
#define TIDEGATE_STREAM_H

#include "edges.h"
#include "hello.h"
#include "hints.h"
#include "packet.h"
#include "prefix.h"
#include "report.h"
#include "turn.h"

enum {
	/* The longest hello, in records of one byte each. */
	STREAM_MAX = HELLO_LENGTH_MAX * 8,
	/* A window each, of a super-segment of 512 KB (GRO_MAX_SIZE of linux/netdevice.h), and where it begins. */
	PIECES_MAX = (1 << 19) / TG_PREFIX_BYTES + 2,
};

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
	__u64 sent = bytes_of(flow, TG_CLIENT);
	enum tg_class class = TG_PLAINTEXT;

	if (is_decided(flow)) {
		settle(key, flow, flow_class(flow));
		return;
	}
	if (!sent)
		return;
	if (flow->flags & TG_FLOW_TLS_HEADERS)
		class = TG_TLS;
	else if (flow->contiguous < sent)
		class = TG_UNKNOWN;
	settle(key, flow, after_server(flow, class));
}

/* Bytes of the client's stream that are wanted are lost, for the reason that the counter tells. */
static __always_inline void lose(const struct tg_flow_key *key, struct tg_flow *flow, enum tg_counter reason)
{
	switch (flow->looking) {
	case TG_AT_HINT:
		count(TG_HINT_LOST);
		flow->looking = TG_AT_NOTHING;
		bpf_map_delete_elem(&prefixes, key);
		break;
	case TG_AT_REPORT:
		count(TG_HELLO_NOT_REPORTED);
		settle(key, flow, flow_class(flow));
		break;
	default:
		count(reason);
		settle(key, flow, TG_UNKNOWN);
	}
}

/* Gives the flow the verdict that the walk through its prefix came to, if it came to one. */
static __always_inline void apply_outcome(const struct tg_flow_key *key, struct tg_flow *flow,
					  const struct tg_hello *hello)
{
	enum tg_class class = TG_TLS;

	switch (hello->outcome) {
	case TG_MORE:
		/* Behind a word of the server it makes no difference whose hello it is. */
		if ((hello->flags & TG_HELLO_HEADERS) && (flow->flags & TG_FLOW_SERVER_FIRST))
			break;
		return;
	case TG_NOT_TLS:
		class = after_server(flow, TG_PLAINTEXT);
		give_verdict(key, flow, class | TG_VERDICT_DECIDED);
		return;
	case TG_MESH_HELLO:
		class = TG_MESH;
		break;
	case TG_BROKEN_HELLO:
		if (flow->turn_state != TG_TURN_TAKEN)
			count(TG_HELLO_MALFORMED);
		break;
	}
	class = flow->turn_state == TG_TURN_TAKEN ? TG_STARTTLS : after_server(flow, class);
	if (!report || (hello->flags & TG_HELLO_ENDED)) {
		give_verdict(key, flow, class | TG_VERDICT_SETTLED);
	} else {
		flow->looking = TG_AT_REPORT;
		give_verdict(key, flow, class | TG_VERDICT_DECIDED);
	}
}

/* A stream that is not TLS: is it known by now what it is? */
static __always_inline void look_for_hint(const struct tg_flow_key *key, struct tg_flow *flow,
					  struct tg_prefix *prefix)
{
	int server_first = flow_class(flow) == TG_SERVER_FIRST;
	int hint;

	if (server_first && !prefix->turned && mysql_turns_to_tls(prefix)) {
		prefix->turned = 1;
		turn_at(flow, prefix, prefix->base + MYSQL_HEADER + MYSQL_LOGIN);
	}
	hint = find_hint(prefix, server_first);
	flow->looking = hint < 0 ? TG_AT_HINT : TG_AT_NOTHING;
	if (hint > 0)
		note_hint(key, flow, hint);
}

struct looking {
	struct __sk_buff *skb;
	const struct tg_flow_key *key;
	struct tg_prefix *prefix;
	struct part part;
	int faults;
};

/* How far the stream is kept. Until the headers of a hello are complete, all from its beginning on. */
static __always_inline __u32 window_end(const struct tg_prefix *prefix)
{
	if (prefix->hello.outcome == TG_NOT_TLS)
		return prefix->base + TG_HINT_BYTES;
	if (prefix->hello.flags & TG_HELLO_HEADERS)
		return prefix->have + TG_PREFIX_BYTES;
	return prefix->base + TG_PREFIX_BYTES;
}

/* Takes in as much of the part as the window has room for. */
static long look_piece(__u32 turn, struct looking *looking)
{
	struct tg_prefix *prefix = looking->prefix;
	struct part piece = looking->part;

	piece.end = least(piece.end, window_end(prefix));
	if (piece.start >= piece.end)
		return 1;
	looking->faults |= fill_prefix(looking->skb, prefix, &piece);
	walk(prefix);
	if (report && (prefix->hello.flags & TG_HELLO_HEADERS))
		tell_hello(looking->key, prefix);
	looking->part.offset += piece.end - piece.start;
	looking->part.start = piece.end;
	return (prefix->hello.flags & TG_HELLO_ENDED) && prefix->hello.outcome != TG_NOT_TLS;
}

/* Takes a part of the stream into the prefix, and draws the conclusions. */
static __noinline int look(struct __sk_buff *skb, const struct tg_flow_key *key, struct tg_flow *flow,
			   struct tg_prefix *prefix, const struct part *part)
{
	struct looking looking = { .skb = skb, .key = key, .prefix = prefix, .part = *part };
	__u32 kept = prefix->have > TG_PREFIX_BYTES ? prefix->have - TG_PREFIX_BYTES : 0;

	if (looking.part.start < kept) {
		looking.part.offset += kept - looking.part.start;
		looking.part.start = kept;
	}
	bpf_loop(PIECES_MAX, look_piece, &looking, 0);
	/* Either map may have given this memory to another connection meanwhile, and these bytes may be that one's. */
	if (*(volatile __u64 *)&prefix->owner != *(volatile __u64 *)&flow->opened) {
		lose(key, flow, TG_PREFIX_EVICTED);
		return 0;
	}
	if (looking.faults & PART_FAILED)
		count(TG_BAD_HEADERS);
	if (looking.faults & PART_OVERLAP)
		set_flag(flow, TG_FLOW_OVERLAP);
	flow->contiguous = prefix->have;
	if (prefix->have)
		set_flag(flow, TG_FLOW_FIRST_BYTE_SEEN);
	if (prefix->base && !flow->base) {
		flow->base = prefix->base;
		set_flag(flow, TG_FLOW_PROXY);
		if ((flow->flags & TG_FLOW_SERVER_SPOKE) && flow->spoke_at <= flow->base)
			set_flag(flow, TG_FLOW_SERVER_FIRST);
	}
	if (prefix->hello.flags & TG_HELLO_HEADERS)
		set_flag(flow, prefix->hello.flags & TG_HELLO_SSLV2 ? TG_FLOW_TLS_HEADERS | TG_FLOW_SSLV2 :
								      TG_FLOW_TLS_HEADERS);
	apply_outcome(key, flow, &prefix->hello);
	if (prefix->hello.outcome == TG_NOT_TLS)
		look_for_hint(key, flow, prefix);
	return 0;
}

static __always_inline void begin_prefix(struct tg_prefix *prefix, const struct tg_flow_key *key,
					 const struct tg_flow *flow)
{
	prefix->owner = flow->opened;
	prefix->lock = 0;
	prefix->have = 0;
	prefix->profile = flow->profile;
	prefix->base = 0;
	prefix->told = 0;
	prefix->searched = 0;
	prefix->port = flow->direction == TG_INBOUND ? local_port(key) : peer_port(key);
	prefix->turned = 0;
	__builtin_memset(prefix->known, 0, sizeof(prefix->known));
	if (flow->turn_state != TG_TURN_TAKEN) {
		begin_walk(&prefix->hello, FIELD_START);
		return;
	}
	begin_turn(prefix, flow);
	prefix->known[0] = flow->turn_known & ~bits(0, prefix->have);
}

/* Whether more of the client's stream is wanted. */
static __always_inline int is_looking(const struct tg_flow *flow)
{
	return !is_settled(flow) && flow->looking != TG_AT_NOTHING;
}

/* A prefix that is in the map, where another processor may be at work on it or may just have settled the flow. */
static __always_inline void look_shared(struct __sk_buff *skb, const struct tg_flow_key *key,
					struct tg_flow *flow, struct tg_prefix *prefix,
					const struct part *part)
{
	if (lock_prefix(prefix)) {
		count(flow->looking == TG_AT_BEGINNING ? TG_PREFIX_BUSY :
		      flow->looking == TG_AT_HINT ? TG_HINT_LOST : TG_HELLO_NOT_REPORTED);
		return;
	}
	if (prefix->owner == flow->opened && is_looking(flow))
		look(skb, key, flow, prefix, part);
	unlock_prefix(prefix);
	if (!is_looking(flow))
		bpf_map_delete_elem(&prefixes, key);
}

/* Puts the prefix into the map. Returns the one that is there already, of this flow. */
static __always_inline struct tg_prefix *store_prefix(const struct tg_flow_key *key, struct tg_flow *flow,
						      struct tg_prefix *prefix)
{
	struct tg_prefix *there;

	if (!bpf_map_update_elem(&prefixes, key, prefix, BPF_NOEXIST)) {
		set_flag(flow, TG_FLOW_PREFIX_STORED);
		return NULL;
	}
	there = bpf_map_lookup_elem(&prefixes, key);
	if (there && there->owner == flow->opened)
		return there;
	/* Left behind by a flow of the same tuple that was evicted. */
	if (!bpf_map_update_elem(&prefixes, key, prefix, BPF_ANY))
		set_flag(flow, TG_FLOW_PREFIX_STORED);
	else
		lose(key, flow, TG_PREFIX_NOT_STORED);
	return NULL;
}

/* A new part of a stream of which more is wanted. */
static __noinline int collect(struct __sk_buff *skb, const struct tg_flow_key *key, struct tg_flow *flow,
			      const struct part *part)
{
	struct tg_scratch *scratched;
	struct tg_prefix *prefix;
	__u32 zero = 0;

	if (flow->flags & TG_FLOW_PREFIX_STORED) {
		prefix = bpf_map_lookup_elem(&prefixes, key);
		if (!prefix || prefix->owner != flow->opened) {
			lose(key, flow, TG_PREFIX_EVICTED);
			return 0;
		}
	} else {
		scratched = bpf_map_lookup_elem(&scratch, &zero);
		if (!scratched)
			return 0;
		begin_prefix(&scratched->prefix, key, flow);
		look(skb, key, flow, &scratched->prefix, part);
		if (!is_looking(flow))
			return 0;
		prefix = store_prefix(key, flow, &scratched->prefix);
		if (!prefix) {
			if (!is_looking(flow))
				bpf_map_delete_elem(&prefixes, key);
			return 0;
		}
	}
	look_shared(skb, key, flow, prefix, part);
	return 0;
}

/* The sequence number that the positions of a flow's prefix count from. */
static __always_inline __u32 looking_from(const struct tg_flow *flow)
{
	return flow->turn_state == TG_TURN_TAKEN ? flow->turn : first_of(flow, TG_CLIENT);
}

/* Cuts the segment's payload down to the part of the stream that is wanted. */
static __always_inline int part_of(const struct tg_flow *flow, const struct tg_segment *segment,
				   struct part *part)
{
	__s32 start = segment->sequence - looking_from(flow);
	__s32 end = start + segment->length;

	part->offset = segment->payload;
	if (start >= STREAM_MAX || end <= 0)
		return 0;
	if (start < 0) {
		part->offset -= start;
		start = 0;
	}
	part->start = start;
	part->end = end;
	return 1;
}

/* The client's turn is a ClientHello. */
static __always_inline void upgrade(struct __sk_buff *skb, const struct tg_flow_key *key, struct tg_flow *flow,
				    const struct tg_segment *segment)
{
	struct part part;

	if (!report) {
		settle(key, flow, TG_STARTTLS);
		return;
	}
	bpf_map_delete_elem(&prefixes, key);
	__sync_fetch_and_and(&flow->flags, ~TG_FLOW_PREFIX_STORED);
	flow->turn_state = TG_TURN_TAKEN;
	flow->looking = TG_AT_REPORT;
	give_verdict(key, flow, TG_STARTTLS | TG_VERDICT_DECIDED);
	if (part_of(flow, segment, &part))
		collect(skb, key, flow, &part);
}

/* Payload of the client that does not decide yet. If nothing follows, the flow was not empty and is not known. */
static __always_inline void stay_undecided(const struct tg_flow_key *key, struct tg_flow *flow,
					   const struct tg_segment *segment)
{
	__u64 sent = bytes_of(flow, TG_CLIENT);
	__s32 ahead = segment->sequence - first_of(flow, TG_CLIENT);

	if (sent)
		/* A PROXY header alone is not the client's word. */
		give_verdict(key, flow, sent <= flow->base && flow->flags & TG_FLOW_SERVER_FIRST ?
						TG_SERVER_FIRST : TG_UNKNOWN);
	else if (ahead != -1 || segment->length != 1)
		/*
		 * Not one of the bytes is of the stream that the SYN began, and it is no keep-alive probe
		 * (RFC 1122 4.2.3.6): the ends talk about another stream than this one.
		 */
		settle(key, flow, TG_UNKNOWN);
}

/* Payload of the client of a flow that is not settled. */
static __always_inline void hear_client(struct __sk_buff *skb, const struct tg_flow_key *key,
					struct tg_flow *flow, const struct tg_segment *segment)
{
	struct part part;

	if (flow->looking != TG_AT_NOTHING && part_of(flow, segment, &part))
		collect(skb, key, flow, &part);
	if (flow->turn_state == TG_TURN_OPEN && !is_settled(flow) && hear_turn(skb, flow, segment))
		upgrade(skb, key, flow, segment);
	if (!is_decided(flow))
		stay_undecided(key, flow, segment);
}

/* A FIN says how long the client's stream is; what has not come by now may still come out of order. */
static __always_inline void client_finished(const struct tg_flow_key *key, struct tg_flow *flow,
					    const struct tg_segment *segment)
{
	__u32 end = segment->sequence + segment->length;

	if ((__s32)(end - next_of(flow, TG_CLIENT)) < 0)
		return;
	flow->fin = end - first_of(flow, TG_CLIENT);
	set_flag(flow, TG_FLOW_CLIENT_FIN);
}

/* Nothing but an acknowledgment, or less. */
static __always_inline int is_bare(const struct tg_segment *segment)
{
	return !segment->length && !(segment->flags & (TCP_SYN | TCP_FIN | TCP_RST));
}

static __always_inline void from_client(struct __sk_buff *skb, const struct tg_flow_key *key,
					struct tg_flow *flow, const struct tg_segment *segment)
{
	if (is_bare(segment))
		return;
	learn_isn(flow, TG_CLIENT, segment);
	take_in(key, flow, TG_CLIENT, segment);
	if (segment->flags & (TCP_FIN | TCP_RST))
		set_flag(flow, TG_FLOW_CLOSED);
	if (segment->length && !is_settled(flow))
		hear_client(skb, key, flow, segment);
	if (is_settled(flow))
		return;
	if (segment->flags & TCP_FIN)
		client_finished(key, flow, segment);
	if ((flow->flags & TG_FLOW_CLIENT_FIN) && !is_decided(flow)) {
		if (flow->contiguous >= flow->fin)
			conclude(key, flow);
		else
			give_verdict(key, flow, TG_UNKNOWN);
	}
	if (segment->flags & TCP_RST)
		conclude(key, flow);
}

/* How many bytes of the client's stream the server has, by its own words. */
static __always_inline __s32 acknowledged(const struct tg_flow *flow, const struct tg_segment *segment)
{
	__s32 bytes = segment->acknowledged - first_of(flow, TG_CLIENT);

	if (!(segment->flags & TCP_ACK) || (segment->flags & TCP_RST))
		return 0;
	if ((flow->flags & TG_FLOW_CLIENT_FIN) && bytes == (__s32)flow->fin + 1)
		return flow->fin;
	return bytes;
}

/* New payload of the server while the client's beginning is undecided. */
static __always_inline void hear_early_server(const struct tg_flow_key *key, struct tg_flow *flow)
{
	__u64 sent = bytes_of(flow, TG_CLIENT);

	if (!(flow->flags & TG_FLOW_SERVER_SPOKE)) {
		flow->spoke_at = sent;
		set_flag(flow, TG_FLOW_SERVER_SPOKE);
	}
	if (sent <= flow->base) {
		set_flag(flow, TG_FLOW_SERVER_FIRST);
		give_verdict(key, flow, TG_SERVER_FIRST);
	}
}

/* A word of the server of a flow that is decided but not settled. */
static __always_inline void hear_acknowledgment(const struct tg_flow_key *key, struct tg_flow *flow,
						const struct tg_segment *segment)
{
	if (!(segment->flags & TCP_ACK) || (segment->flags & TCP_RST))
		return;
	if (flow->turn_state == TG_TURN_OPEN)
		server_acknowledged(flow, segment->acknowledged);
	if ((flow->flags & TG_FLOW_CLIENT_FIN) &&
	    segment->acknowledged == first_of(flow, TG_CLIENT) + flow->fin + 1) {
		/* There is nothing to come from the client. */
		settle(key, flow, flow_class(flow));
		return;
	}
	if (flow->looking != TG_AT_NOTHING &&
	    (__s32)(segment->acknowledged - looking_from(flow) - flow->contiguous) > 0)
		lose(key, flow, TG_BYTES_MISSED);
}

static __always_inline void from_server(const struct tg_flow_key *key, struct tg_flow *flow,
					const struct tg_segment *segment)
{
	__s32 acked;
	__u32 gain;

	if (is_bare(segment) && is_settled(flow))
		return;
	learn_isn(flow, TG_SERVER, segment);
	gain = take_in(key, flow, TG_SERVER, segment);
	if (!is_settled(flow)) {
		acked = acknowledged(flow, segment);
		if (is_decided(flow))
			hear_acknowledgment(key, flow, segment);
		else if (acked > 0 && acked > (__s32)flow->contiguous)
			lose(key, flow, TG_BYTES_MISSED);
		else if (gain)
			hear_early_server(key, flow);
		if (gain)
			server_spoke(flow);
	}
	if (segment->flags & TCP_RST) {
		set_flag(flow, TG_FLOW_CLOSED);
		if (!is_settled(flow))
			conclude(key, flow);
	}
}

#endif
