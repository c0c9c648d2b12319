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
#include "packet.h"
#include "stream.h"

/* TCX_NEXT of Linux 6.6, TC_ACT_UNSPEC of clsact. */
enum { NEXT_PROGRAM = -1 };

/* Which network namespace this copy of the program serves; see struct tg_interface. */
const volatile __u32 scope = 0;

const volatile __u32 report = 0;

enum way {
	FROM_POD,
	TO_POD,
};

static __always_inline void make_key(const struct tg_attachment *attachment,
				     const struct tg_segment *segment, enum way way,
				     struct tg_flow_key *key)
{
	key->workload = attachment->workload;
	key->pad = 0;
	if (way == FROM_POD) {
		__builtin_memcpy(key->local, segment->source, sizeof(key->local));
		__builtin_memcpy(key->peer, segment->destination, sizeof(key->peer));
		key->local_port = segment->source_port;
		key->peer_port = segment->destination_port;
	} else {
		__builtin_memcpy(key->local, segment->destination, sizeof(key->local));
		__builtin_memcpy(key->peer, segment->source, sizeof(key->peer));
		key->local_port = segment->destination_port;
		key->peer_port = segment->source_port;
	}
}

static __always_inline enum tg_role sender(const struct tg_flow *flow, enum way way)
{
	return (flow->direction == TG_OUTBOUND) == (way == FROM_POD) ? TG_CLIENT : TG_SERVER;
}

/* Stores the flow, and counts its connection if no other processor was faster. */
static __always_inline struct tg_flow *store(const struct tg_flow_key *key, struct tg_flow *fresh)
{
	struct tg_flow *flow;
	long error;

	error = bpf_map_update_elem(&flows, key, fresh, BPF_NOEXIST);
	flow = bpf_map_lookup_elem(&flows, key);
	if (!flow) {
		count(TG_FLOW_NOT_STORED);
		return NULL;
	}
	if (!error)
		credit(key, flow, flow_class(flow), 0, 0);
	return flow;
}

/* A flow that begins with this SYN. */
static __noinline struct tg_flow *new_flow(const struct tg_attachment *attachment,
					   const struct tg_flow_key *key,
					   const struct tg_segment *segment, enum way way)
{
	struct tg_flow fresh = {
		.opened = bpf_ktime_get_boot_ns(),
		.isn[TG_CLIENT] = segment->sequence - 1,
		.next[TG_CLIENT] = segment->sequence,
		.flags = TG_FLOW_SYN_SEEN | TG_FLOW_CLIENT_SEQ,
		.profile = attachment->profile,
		.verdict = TG_EMPTY,
		.direction = way == FROM_POD ? TG_OUTBOUND : TG_INBOUND,
	};

	return store(key, &fresh);
}

/* A SYN without ACK: the sender is the client. Returns the flow that it belongs to. */
static __always_inline struct tg_flow *open_flow(const struct tg_attachment *attachment,
						 const struct tg_flow_key *key,
						 const struct tg_segment *segment, enum way way,
						 struct tg_flow *old)
{
	if (old) {
		if (sender(old, way) == TG_CLIENT && (old->flags & TG_FLOW_SYN_SEEN) &&
		    old->isn[TG_CLIENT] == segment->sequence - 1)
			return old;
		/* RFC 9293 3.5, figure 7: both ends opened at once; the first SYN made the flow. */
		if (sender(old, way) == TG_SERVER && (old->flags & TG_FLOW_SYN_SEEN) &&
		    !(old->flags & (TG_FLOW_SERVER_SEQ | TG_FLOW_CLOSED)))
			return old;
		if (!is_settled(old))
			conclude(key, old);
		bpf_map_delete_elem(&flows, key);
	}
	return new_flow(attachment, key, segment, way);
}

static __always_inline enum tg_direction guess_direction(const struct tg_attachment *attachment,
							 const struct tg_flow_key *key)
{
	__u32 i;

	for (i = 0; i < TG_SERVICE_PORTS && i < attachment->port_count; i++)
		if (attachment->ports[i] == key->local_port)
			return TG_INBOUND;
	return key->local_port < key->peer_port ? TG_INBOUND : TG_OUTBOUND;
}

/* Payload of a connection whose SYN was not seen: unknown, for good. */
static __noinline struct tg_flow *join_flow(const struct tg_attachment *attachment,
					    const struct tg_flow_key *key)
{
	struct tg_flow fresh = {
		.opened = bpf_ktime_get_boot_ns(),
		.verdict = TG_UNKNOWN | TG_VERDICT_SETTLED,
		.profile = attachment->profile,
		.direction = guess_direction(attachment, key),
	};

	count(TG_JOINED_MIDSTREAM);
	return store(key, &fresh);
}

static __always_inline int observe(struct __sk_buff *skb, enum way way)
{
	struct tg_interface interface = { .scope = scope, .ifindex = skb->ifindex };
	struct tg_attachment *attachment;
	struct tg_segment segment;
	struct tg_flow_key key;
	struct tg_flow *flow;

	attachment = bpf_map_lookup_elem(&attachments, &interface);
	if (!attachment) {
		count(TG_NO_WORKLOAD);
		return NEXT_PROGRAM;
	}
	if (parse_packet(skb, &segment))
		return NEXT_PROGRAM;
	make_key(attachment, &segment, way, &key);
	flow = bpf_map_lookup_elem(&flows, &key);
	if ((segment.flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		flow = open_flow(attachment, &key, &segment, way, flow);
	else if (!flow && segment.length)
		flow = join_flow(attachment, &key);
	if (!flow)
		return NEXT_PROGRAM;
	if (sender(flow, way) == TG_CLIENT)
		from_client(skb, &key, flow, &segment);
	else
		from_server(&key, flow, &segment);
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
