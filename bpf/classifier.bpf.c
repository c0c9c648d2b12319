// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0)
/*
 * Classifies every TCP connection of a workload by the beginning of its client's byte stream.
 *
 * Theory of operation. Two programs watch a workload's interface, one for each way. A SYN opens a flow, counted as
 * empty. The client's first bytes are put together by stream position (prefix.h) and looked at as they grow
 * (proxy.h, hello.h), until they are or are not a TLS ClientHello; meanwhile the flow is unknown. Then its class is
 * decided, and its connection moves to the edge of that class (edges.h). A flow of TLS is settled and only counts
 * bytes; one that is not may get a hint (hints.h), and is looked at again where an upgrade to TLS can be (turn.h).
 *
 * The programs stand in the path of the packets: what a server acknowledges has been here before. If it
 * acknowledges bytes that were not seen, they never will be, and the flow is unknown.
 *
 * Nothing is ever dropped or changed, and other programs on the interface have their say (TCX_NEXT).
 */
#include "edges.h"
#include "flows.h"
#include "packet.h"
#include "stream.h"

/* TCX_NEXT of Linux 6.6, TC_ACT_UNSPEC of clsact. */
enum { NEXT_PROGRAM = -1 };

/* Which network namespace this copy of the program serves; see struct tg_interface. */
const volatile __u32 scope = 0;

/* Whether ClientHellos are reported; see report.h. */
const volatile __u32 report = 0;

static __always_inline enum tg_role sender(const struct tg_flow *flow, enum way way)
{
	return (flow->direction == TG_OUTBOUND) == (way == FROM_POD) ? TG_CLIENT : TG_SERVER;
}

/* Whose the flow's interface is; NULL for one that is just being detached. */
static __always_inline const struct tg_attachment *owner(const struct tg_flow_key *key)
{
	const struct tg_attachment *attachment = bpf_map_lookup_elem(&attachments, &key->interface);

	if (!attachment)
		count(TG_NO_WORKLOAD);
	return attachment;
}

/*
 * Stores the flow, which is one of `fresh->tally[TG_CONNECTION]` connections from now on. Its edge is looked up before:
 * so there is nothing to be looked up again behind a SYN. Returns whether no other processor was faster.
 */
static __always_inline int store(const struct tg_flow_key *key, struct tg_flow *fresh)
{
	__u64 hash = flow_hash(key);
	enum tg_class class = flow_class(fresh);
	struct tg_edge *edge, *full = overflow_of(class);
	__u32 place;

	fresh->key = *key;
	fresh->seat = NO_SEAT;
	edge = at_place(key, fresh, class, NO_SEAT);
	if (!edge || !full)
		return 0;
	place = edge == full ? class | TG_PLACE_OVERFLOW : class;
	fresh->tally[TG_CONNECTION] = tally(1, place);
	fresh->tally[TG_CLIENT] = tally(0, place);
	fresh->tally[TG_SERVER] = tally(0, place);
	if (bpf_map_update_elem(&flows, &hash, fresh, BPF_NOEXIST))
		return 0;
	add(&edge->tally[TG_CONNECTION], 1);
	touch(edge);
	return 1;
}

/* The flow that is stored; by now another processor may have begun to count on it. */
static __always_inline struct tg_flow *stored(const struct tg_flow_key *key)
{
	struct tg_flow *flow = find_flow(key, flow_hash(key));

	if (!flow)
		count(TG_FLOW_NOT_STORED);
	return flow;
}

/*
 * A SYN without ACK: the sender is the client. Whether it begins a flow, which takes the place of the one that had its
 * tuple.
 */
static __always_inline int begins_flow(const struct tg_flow_key *key, const struct tg_segment *segment,
				       enum way way, struct tg_flow *old)
{
	__u64 hash;

	if (!old)
		return 1;
	if (sender(old, way) == TG_CLIENT && (old->flags & TG_FLOW_SYN_SEEN) &&
	    first_of(old, TG_CLIENT) == segment->sequence)
		return 0;
	/* RFC 9293 3.5, figure 7: both ends opened at once; the first SYN made the flow. */
	if (sender(old, way) == TG_SERVER && (old->flags & TG_FLOW_SYN_SEEN) &&
	    !known_isn(old, TG_SERVER) && !(old->flags & TG_FLOW_CLOSED))
		return 0;
	/* Of several processors that see this SYN, one makes room for the new flow. */
	if (__sync_fetch_and_or(&old->flags, TG_FLOW_REPLACED) & TG_FLOW_REPLACED)
		return 0;
	if (!is_settled(old))
		conclude(key, old);
	hash = flow_hash(key);
	bpf_map_delete_elem(&flows, &hash);
	return 1;
}

/* A flow that begins with this SYN. */
static __noinline int new_flow(const struct tg_flow_key *key, const struct tg_segment *segment, enum way way,
			       const struct tg_attachment *attachment)
{
	struct tg_flow fresh = {
		.isn[TG_CLIENT] = (__u32)(segment->sequence - 1) | TG_ISN_KNOWN,
		.flags = TG_FLOW_SYN_SEEN,
		.verdict = TG_EMPTY,
		.direction = way == FROM_POD ? TG_OUTBOUND : TG_INBOUND,
		.segments = segment->packets,
	};

	fresh.opened = bpf_ktime_get_boot_ns();
	fresh.workload = attachment->workload;
	fresh.profile = attachment->profile;
	return store(key, &fresh);
}

static __always_inline enum tg_direction guess_direction(const struct tg_attachment *attachment,
							 const struct tg_flow_key *key)
{
	__u32 i;

	for (i = 0; i < TG_SERVICE_PORTS && i < attachment->port_count; i++)
		if (attachment->ports[i] == local_port(key))
			return TG_INBOUND;
	return local_port(key) < peer_port(key) ? TG_INBOUND : TG_OUTBOUND;
}

/* Payload of a connection whose SYN was not seen: unknown, for good. */
static __noinline int join_flow(const struct tg_flow_key *key, const struct tg_segment *segment,
				const struct tg_attachment *attachment)
{
	struct tg_flow fresh = {
		.verdict = TG_UNKNOWN | TG_VERDICT_SETTLED,
		.segments = segment->packets,
	};

	fresh.opened = bpf_ktime_get_boot_ns();
	fresh.workload = attachment->workload;
	fresh.profile = attachment->profile;
	fresh.direction = guess_direction(attachment, key);
	count(TG_JOINED_MIDSTREAM);
	return store(key, &fresh);
}

static __always_inline int observe(struct __sk_buff *skb, enum way way)
{
	struct tg_flow_key key;
	const struct tg_attachment *attachment;
	struct tg_segment segment;
	struct tg_flow *flow;
	int opens, is_new = 0;

	*(key_word *)&key.interface = one_word(scope, skb->ifindex);
	if (parse_packet(skb, way, &key, &segment))
		return NEXT_PROGRAM;
	segment.packets = skb->gso_segs ?: 1;
	flow = find_flow(&key, flow_hash(&key));
	opens = (segment.flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
	if (opens ? begins_flow(&key, &segment, way, flow) : !flow && segment.length) {
		attachment = owner(&key);
		if (!attachment)
			return NEXT_PROGRAM;
		is_new = opens ? new_flow(&key, &segment, way, attachment) :
				 join_flow(&key, &segment, attachment);
		if (is_new && !segment.length)
			return NEXT_PROGRAM;
		flow = stored(&key);
	}
	if (!flow)
		return NEXT_PROGRAM;
	if (sender(flow, way) == TG_CLIENT)
		from_client(skb, &key, flow, &segment);
	else
		from_server(&key, flow, &segment);
	/* Last, as whatever follows an atomic addition waits for it. */
	if (!is_new)
		__sync_fetch_and_add(&flow->segments, segment.packets);
	return NEXT_PROGRAM;
}

SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	return observe(skb, FROM_POD);
}

SEC("tc")
int to_pod(struct __sk_buff *skb)
{
	return observe(skb, TO_POD);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
